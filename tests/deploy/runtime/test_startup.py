"""What a command does not import before its first stage, and the times that it reports."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from deploy.run.directory import RunDirectory
from deploy.runtime.startup import StartUp
from deploy.terminal.view import View


@pytest.mark.process
def test_the_stages_before_ppo_do_not_import_torch() -> None:
    code = (
        "import sys, deploy.stages.launch; print(*{'torch', 'transformers', 'ray.rllib', 'vllm'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_phases_and_total_are_in_the_summary_after_the_first_step(tmp_path: Path) -> None:
    start_up = StartUp(RunDirectory(tmp_path), View(console=Console(file=io.StringIO())))
    with start_up.phase("ray"):
        pass
    with pytest.raises(ValueError, match="no"), start_up.phase("learner_group"):
        raise ValueError("no")
    with start_up.phase("ray"):
        pass
    assert RunDirectory(tmp_path).summary() == {}
    start_up.first_step(waited_s=0.5, step_s=0.25)
    start = RunDirectory(tmp_path).summary()["start_s"]
    assert list(start) == ["command", "ray", "first_batch", "first_step", "total"]
    assert start["total"] >= start["command"] > 0
