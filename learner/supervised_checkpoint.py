"""Where a supervised stage stands, on disk: what it needs to go on to the very same weights.

A checkpoint is a folder `step-000010`, whole or not there: `model.safetensors`, `state.safetensors` (optimiser and
random state), `best.safetensors` where there are better weights than the last, and `progress.json`. The newest replaces
the one before it. Batches need no state: their order is a function of the seed.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor, nn

from cluster.errors import InputError
from learner.checkpoint import OPTIMIZER, optimizer_tensors, whole_folder

_NAME = re.compile(r"step-(\d+)")


@dataclass
class Progress:
    """How far a stage has come: optimiser steps done, their metrics since the last checkpoint, the best so far."""

    step: int = 0
    rows: list[dict[str, float]] = field(default_factory=list)
    kept: dict[str, float] = field(default_factory=dict)
    """What was measured of the weights to be kept, with their `step`; empty before the first measurement."""
    num_worse: int = 0
    """Measurements since."""


class Checkpoints:
    """The checkpoints of one stage, made of one set of data and settings, which `made_of` tells from others."""

    def __init__(self, folder: Path, made_of: str) -> None:
        self._folder = folder
        self._made_of = made_of

    def save(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress, best: dict[str, Tensor]
    ) -> None:
        """Write a checkpoint; the one before it goes once this one is whole."""
        before = self._all()
        with whole_folder(self._folder / f"step-{progress.step:06d}") as folder:
            save_model(model, str(folder / "model.safetensors"))
            save_file(optimizer_tensors(optimizer, model) | _random_state(), folder / "state.safetensors")
            if best:
                save_file(best, folder / "best.safetensors")
            record = {"made_of": self._made_of, "progress": asdict(progress)}
            (folder / "progress.json").write_text(json.dumps(record) + "\n")
        for old in before:
            if old.name != f"step-{progress.step:06d}":
                shutil.rmtree(old)

    def load(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Progress, dict[str, Tensor]]:
        """Put model, optimiser and random state where the newest checkpoint has them; how far that was, and the best
        weights. Raises InputError where it was made of other data or settings."""
        newest = next(reversed(self._all()), None)
        if newest is None:
            return Progress(), {}
        record = _read(newest / "progress.json")
        if record["made_of"] != self._made_of:
            raise InputError(str(newest), "made of other data or settings than these; without it the stage starts over")
        load_model(model, str(newest / "model.safetensors"))
        state = load_file(newest / "state.safetensors")
        _set_random_state({name: state.pop(name) for name in list(state) if name.startswith("random.")})
        _load_optimizer(optimizer, model, state)
        best = newest / "best.safetensors"
        return Progress(**record["progress"]), load_file(best) if best.exists() else {}

    def remove(self) -> None:
        """Delete them all: the stage is done."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _all(self) -> list[Path]:
        """Oldest first."""
        found = [path for path in self._folder.iterdir() if _NAME.fullmatch(path.name)] if self._folder.is_dir() else []
        return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def _read(path: Path) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads(path.read_text())
        Progress(**record["progress"])
        str(record["made_of"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(str(path), f"no checkpoint: {error}") from error
    return record


def _random_state() -> dict[str, Tensor]:
    """The state of torch's generators, from which dropout draws."""
    states = {"random.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["random.cuda"] = torch.cuda.get_rng_state()
    return states


def _set_random_state(states: dict[str, Tensor]) -> None:
    torch.set_rng_state(states["random.cpu"])
    if "random.cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["random.cuda"])


def _load_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Take back what `optimizer_tensors` gave, each tensor to its parameter's device."""
    parameters = dict(model.named_parameters())
    for name, tensor in tensors.items():
        parameter, _, key = name.removeprefix(OPTIMIZER).rpartition(".")
        optimizer.state[parameters[parameter]][key] = tensor.to(parameters[parameter].device)
