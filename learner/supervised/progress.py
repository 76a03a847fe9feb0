"""Where a supervised stage stands, on disk: what it needs to go on to the very same weights.

A checkpoint is a folder `step-000010`, whole or not there: the state that `checkpoint` writes, the best weights among
it where there are better ones than the last, and `progress.json`. The newest replaces the one before it. There is no
random state to keep: nothing drops out, and the order of batches is a function of the seed.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cluster.errors import InputError
from learner import checkpoint
from learner.checkpoint import Rows
from learner.distributed.ranks import Ranks

BEST = "best."
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


Weights = Mapping[str, Rows]
"""What of a model's weights lies on this rank, in the CPU's memory."""


def copied_weights(model: nn.Module) -> Weights:
    """The weights as they are now."""
    return {name: _copied(weights) for name, weights in checkpoint.trained_tensors(model).items()}


def _copied(weights: Tensor) -> Rows:
    rows = Rows.of(weights)
    return rows._replace(tensor=rows.tensor.detach().to("cpu", copy=True))


@torch.no_grad()
def put_weights(model: nn.Module, weights: Weights) -> None:
    """Give the model weights that were its own before."""
    trained = checkpoint.trained_tensors(model)
    for name, rows in weights.items():
        Rows.of(trained[name]).tensor.copy_(rows.tensor)


class Checkpoints:
    """The checkpoints of one stage, made of one set of data and settings, which `made_of` tells from others.

    Every rank calls every method.
    """

    def __init__(self, folder: Path, made_of: str, ranks: Ranks) -> None:
        self._folder = folder
        self._made_of = made_of
        self._ranks = ranks

    def save(self, model: nn.Module, adamw: torch.optim.Optimizer, progress: Progress, best: Weights) -> None:
        """Write a checkpoint; the one before it goes once this one is whole."""
        path, first = self._folder / f"step-{progress.step:06d}", self._ranks.rank == 0
        tensors: dict[str, Tensor | Rows] = {
            **checkpoint.trained_tensors(model),
            **checkpoint.optimizer_tensors(adamw, model),
            **{f"{BEST}{name}": rows for name, rows in best.items()},
        }
        with checkpoint.shared_folder(path, self._ranks) as folder:
            with self._ranks.agreed():
                checkpoint.write_state(folder, tensors, self._ranks)
            with self._ranks.agreed():
                if first:
                    record = {"made_of": self._made_of, "progress": asdict(progress)}
                    (folder / "progress.json").write_text(json.dumps(record) + "\n")
                    checkpoint.write_index(folder, progress.step)
        for old in self._all() if first else ():
            if old != path:
                shutil.rmtree(old)

    def load(self, model: nn.Module, adamw: torch.optim.Optimizer) -> tuple[Progress, Weights]:
        """Put model and optimiser where the newest checkpoint has them; how far that was, and the best weights.

        Raises InputError where it was made of other data or settings.
        """
        newest = next(reversed(self._all()), None)
        if newest is None:
            return Progress(), {}
        record = _read(newest / "progress.json")
        if record["made_of"] != self._made_of:
            raise InputError(str(newest), "made of other data or settings than these; without it the stage starts over")
        state = checkpoint.State(newest)
        checkpoint.restore(state, adamw, model)
        return Progress(**record["progress"]), _best(state, model)

    def remove(self) -> None:
        """Delete them all: the stage is done."""
        if self._ranks.rank == 0:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _all(self) -> list[Path]:
        """Oldest first."""
        found = [path for path in self._folder.iterdir() if _NAME.fullmatch(path.name)] if self._folder.is_dir() else []
        return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


@torch.no_grad()
def _best(state: checkpoint.State, model: nn.Module) -> Weights:
    best: dict[str, Rows] = {}
    for name, weights in checkpoint.trained_tensors(model).items():
        if f"{BEST}{name}" in state.names:
            stored = torch.zeros_like(weights)
            state.fill(f"{BEST}{name}", stored)
            best[name] = _copied(stored)
    return best


def _read(path: Path) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads(path.read_text())
        Progress(**record["progress"])
        str(record["made_of"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(str(path), f"no checkpoint: {error}") from error
    return record
