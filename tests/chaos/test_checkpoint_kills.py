"""Checkpoints written by processes that are killed at random moments: the newest whole one is there every time."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from learner import checkpoint
from learner.distributed.ranks import Ranks

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(600)]

NUM_KILLS = 200
NUM_TENSORS, SIZE = 6, 64
ONE = Ranks(torch.device("cpu"), distributed=False)


def tensors(version: int) -> dict[str, torch.Tensor]:
    return {f"t{i}": torch.full((SIZE, SIZE), float(version * 100 + i)) for i in range(NUM_TENSORS)}


def write_for_ever(folder: Path, version: int) -> None:
    """Checkpoint after checkpoint, keeping the newest two, as a run does."""
    torch.set_num_threads(1)
    while True:
        version += 1
        with checkpoint.shared_folder(folder / f"step-{version:06d}", ONE) as partial:
            checkpoint.write_state(partial, tensors(version), ONE)
            checkpoint.write_index(partial, version)
        for old in checkpoints(folder)[:-2]:
            shutil.rmtree(old)


def checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*"))


def newest(folder: Path) -> int:
    """The version of the newest checkpoint, which is whole; 0 where there is none."""
    found = checkpoints(folder)
    if not found:
        return 0
    state = checkpoint.State(found[-1])
    assert f"step-{state.version:06d}" == found[-1].name
    for name, tensor in tensors(state.version).items():
        assert torch.equal(state.read(name), tensor), f"{name} of version {state.version}"
    return state.version


def killed_after(seconds: float, folder: Path, version: int) -> None:
    """Start a process that resumes after `version`, and kill it at an arbitrary point."""
    pid = os.fork()
    if pid == 0:
        try:
            write_for_ever(folder, version)
        finally:
            os._exit(1)
    time.sleep(seconds)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def test_the_newest_whole_checkpoint_is_found_after_each_of_200_kills(tmp_path: Path) -> None:
    draw, version, num_torn = random.Random(0), 0, 0
    for _ in range(NUM_KILLS):
        killed_after(draw.uniform(0.0, 0.12), tmp_path, version)
        found = newest(tmp_path)
        assert found >= version, "a checkpoint that was whole is gone"
        version = found
        temporary = [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]
        assert len(temporary) <= 1, temporary
        num_torn += len(temporary)
    print(f"{NUM_KILLS} of {NUM_KILLS} went on, {num_torn} with a temporary left, at version {version}")
    assert num_torn > NUM_KILLS // 20, "the kills met no checkpoint being written"
