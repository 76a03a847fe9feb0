"""Checkpoints of a supervised stage, from which it resumes to exactly the same weights.

A checkpoint is a folder `step-000010`, written atomically: the state that `learner.checkpoint` writes, which includes
the best weights if they are not the last, and `progress.json`. Each checkpoint replaces the one before. No random state
is saved: there is no dropout, and the order of batches depends on the seed only.
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
    """Progress of a stage: optimiser steps done, metrics since the last checkpoint, the best measurement."""

    step: int = 0
    rows: list[dict[str, float]] = field(default_factory=list)
    kept: dict[str, float] = field(default_factory=dict)
    """Metrics of the weights to keep, with their `step`; empty before the first measurement."""
    num_worse: int = 0
    """Measurements since then, all worse."""


Weights = Mapping[str, Rows]
"""This rank's part of a model's weights, in CPU memory."""


def copied_weights(model: nn.Module) -> Weights:
    """Copy the current weights to CPU memory."""
    return {name: _copied(weights) for name, weights in checkpoint.trained_tensors(model).items()}


def _copied(weights: Tensor) -> Rows:
    rows = Rows.of(weights)
    return rows._replace(tensor=rows.tensor.detach().to("cpu", copy=True))


@torch.no_grad()
def put_weights(model: nn.Module, weights: Weights) -> None:
    """Restore weights that `copied_weights` returned."""
    trained = checkpoint.trained_tensors(model)
    for name, rows in weights.items():
        Rows.of(trained[name]).tensor.copy_(rows.tensor)


class Checkpoints:
    """Saves and loads the checkpoints of one stage; `made_of` identifies its data and settings.

    All methods are collective.
    """

    def __init__(self, folder: Path, made_of: str, ranks: Ranks) -> None:
        self._folder = folder
        self._made_of = made_of
        self._ranks = ranks

    def save(self, model: nn.Module, adamw: torch.optim.Optimizer, progress: Progress, best: Weights) -> None:
        """Write a checkpoint, then delete the one before."""
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
        """Restore model and optimiser from the newest checkpoint; returns its progress and the best weights.

        Raises InputError if it was made from other data or settings.
        """
        newest = next(reversed(self._all()), None)
        if newest is None:
            return Progress(), {}
        record = _read(newest / "progress.json")
        if record["made_of"] != self._made_of:
            raise InputError(str(newest), "was made from other data or settings: delete it to start the stage over")
        state = checkpoint.State(newest)
        checkpoint.restore(state, adamw, model)
        return Progress(**record["progress"]), _best(state, model)

    def remove(self) -> None:
        """Delete all checkpoints, after the stage is done."""
        if self._ranks.rank == 0:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _all(self) -> list[Path]:
        """List the checkpoints, oldest first."""
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
