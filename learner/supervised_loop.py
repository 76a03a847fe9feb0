"""The loop of both supervised stages: optimiser steps, measurements on held-out rows, the best weights, checkpoints.

Knows neither losses nor data: a stage hands in what a batch's loss is and how held-out rows are measured.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from learner.supervised import Optimizer
from learner.supervised_checkpoint import Checkpoints, Progress


class BatchLoss(NamedTuple):
    """The loss [] of a batch, what else is told of it, and how many of the stage's units it has."""

    loss: Tensor
    metrics: dict[str, float]
    num_units: int


@dataclass(frozen=True, slots=True)
class Plan:
    """How long and how fast to descend, how often to measure and to write checkpoints."""

    num_steps: int
    learning_rate: float
    evaluate_every_steps: int
    keeps_best: bool
    """Whether the weights of the lowest `held_out_loss` are kept, not the last."""
    patience: int | None
    checkpoint_every_steps: int
    unit: str
    """What `num_units` counts; the rate is reported as `UNIT_per_s`."""


def checkpoints_of(folder: Path | None, config: Any, seed: int, rows: Sequence[Any]) -> Checkpoints | None:
    """The checkpoints of a stage with these settings and rows in that folder, if there is one."""
    if folder is None:
        return None
    digest = hashlib.sha256(f"{seed} {config.model_dump_json()}".encode())
    for row in rows:
        digest.update(repr(row).encode())
    return Checkpoints(folder, digest.hexdigest())


def descend(
    model: nn.Module,
    batches: Iterator[list[int]],
    loss_of: Callable[[list[int]], BatchLoss],
    evaluate: Callable[[], dict[str, float]] | None,
    plan: Plan,
    checkpoints: Checkpoints | None,
) -> Generator[dict[str, float], None, dict[str, float]]:
    """Train to the plan's last step or until its patience ends; yields each step's metrics.

    Goes on from the newest checkpoint, and first yields again the rows since the one before it. Returns what was
    measured of the weights that the model has in the end: empty where nothing was. `evaluate` gives `held_out_loss`.
    """
    optimizer = Optimizer(model, learning_rate=plan.learning_rate, num_steps=plan.num_steps)
    progress, best = checkpoints.load(model, optimizer.adamw) if checkpoints else (Progress(), {})
    optimizer.num_done = progress.step
    # Ray sends into the generators that it streams, which a list's iterator could not take.
    yield from (row for row in progress.rows)
    progress.rows = []
    for batch in itertools.islice(batches, progress.step, plan.num_steps):
        if plan.patience is not None and progress.num_worse >= plan.patience:
            break
        row = _step(optimizer, loss_of, batch, plan.unit)
        progress.step += 1
        last = progress.step == plan.num_steps
        if evaluate and (last or progress.step % plan.evaluate_every_steps == 0):
            row |= _measured(model, evaluate)
            if _is_kept(progress, row, plan) and plan.keeps_best:
                best = {name: weights.detach().cpu().clone() for name, weights in model.named_parameters()}
        progress.rows.append(row)
        yield row
        if checkpoints and not last and progress.step % plan.checkpoint_every_steps == 0:
            checkpoints.save(model, optimizer.adamw, progress, best)
            progress.rows = []
    model.load_state_dict(best, strict=False)
    return progress.kept


def _step(
    optimizer: Optimizer, loss_of: Callable[[list[int]], BatchLoss], batch: list[int], unit: str
) -> dict[str, float]:
    """One optimiser step; returns its row of metrics."""
    started = time.perf_counter()
    loss, metrics, num_units = loss_of(batch)
    optimizer.step(loss)
    per_s = num_units / (time.perf_counter() - started)
    return {"loss": loss.item(), "step": float(optimizer.num_done), **metrics, f"{unit}_per_s": per_s}


def _measured(model: nn.Module, evaluate: Callable[[], dict[str, float]]) -> dict[str, float]:
    model.eval()
    with torch.no_grad():
        metrics = evaluate()
    model.train()
    return metrics


def _is_kept(progress: Progress, row: dict[str, float], plan: Plan) -> bool:
    """Whether the weights just measured are those to keep, by the plan; takes note of it."""
    before = progress.kept.get("held_out_loss", math.inf)
    if progress.kept and plan.keeps_best and not _number(row["held_out_loss"]) < _number(before):
        progress.num_worse += 1
        return False
    progress.kept, progress.num_worse = dict(row), 0
    return True


def _number(loss: float) -> float:
    """A loss to compare; what is no number is worse than any."""
    return math.inf if math.isnan(loss) else loss
