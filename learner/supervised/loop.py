"""The loop of both supervised stages: optimiser steps, evaluation, best weights, checkpoints.

A stage passes in the functions that compute a batch's gradient and evaluate held-out rows. Every rank runs the same
loop, in step with the others.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from learner.distributed.ranks import Ranks
from learner.learning_rates import Schedule
from learner.supervised.optimizer import Optimizer
from learner.supervised.progress import Checkpoints, Progress, copied_weights, put_weights

Row = dict[str, float]
"""Metrics of a step, the same on all ranks."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Number of steps, peak learning rate and its schedule, and how often to evaluate and to write checkpoints."""

    num_steps: int
    learning_rate: float
    schedule: Schedule
    evaluate_every_steps: int
    keeps_best: bool
    """Whether to keep the weights of the lowest `held_out_loss` instead of the last."""
    patience: int | None
    checkpoint_every_steps: int
    unit: str
    """The batch metric `num_UNIT` is reported as the rate `UNIT_per_s`."""


def checkpoints_of(
    folder: Path | None, config: Any, seed: int, rows: Sequence[Any], ranks: Ranks
) -> Checkpoints | None:
    """Return the checkpoints of a stage with these settings and rows; None without a folder."""
    if folder is None:
        return None
    digest = hashlib.sha256(f"{seed} {config.model_dump_json()}".encode())
    for row in rows:
        digest.update(repr(row).encode())
    return Checkpoints(folder, digest.hexdigest(), ranks)


def descend(
    model: nn.Module,
    optimizer: Optimizer,
    batches: Iterator[list[int]],
    accumulate: Callable[[list[int]], Row],
    evaluate: Callable[[], Row] | None,
    plan: Plan,
    checkpoints: Checkpoints | None,
) -> Generator[Row, None, Row]:
    """Train to the plan's last step or until its patience runs out; yields each step's metrics.

    `accumulate` adds this rank's gradient of the batch loss and returns the batch's metrics; `evaluate` returns
    `held_out_loss`. Resumes from the newest checkpoint, and first repeats the rows since the one before it. Returns the
    metrics of the weights that the model has at the end; empty if they were not measured.
    """
    progress, best = checkpoints.load(model, optimizer.adamw) if checkpoints else (Progress(), {})
    optimizer.num_done = progress.step
    yield from progress.rows
    progress.rows = []
    for batch in itertools.islice(batches, progress.step, plan.num_steps):
        if plan.patience is not None and progress.num_worse >= plan.patience:
            break
        row = _step(optimizer, accumulate, batch, plan.unit)
        progress.step += 1
        last = progress.step == plan.num_steps
        if evaluate and (last or progress.step % plan.evaluate_every_steps == 0):
            row |= evaluate()
            if _is_kept(progress, row, plan) and plan.keeps_best:
                best = copied_weights(model)
        progress.rows.append(row)
        yield row
        if checkpoints and not last and progress.step % plan.checkpoint_every_steps == 0:
            checkpoints.save(model, optimizer.adamw, progress, best)
            progress.rows = []
    put_weights(model, best)
    return progress.kept


def _step(optimizer: Optimizer, accumulate: Callable[[list[int]], Row], batch: list[int], unit: str) -> Row:
    """Run one optimiser step; returns its metrics."""
    started = time.perf_counter()
    optimizer.clear()
    metrics = accumulate(batch)
    optimizer.step()
    per_s = metrics.pop(f"num_{unit}") / (time.perf_counter() - started)
    return {**metrics, "step": float(optimizer.num_done), f"{unit}_per_s": per_s}


def _is_kept(progress: Progress, row: dict[str, float], plan: Plan) -> bool:
    """Update the progress with a measurement; returns whether its weights are the ones to keep."""
    before = progress.kept.get("held_out_loss", math.inf)
    if progress.kept and plan.keeps_best and not _number(row["held_out_loss"]) < _number(before):
        progress.num_worse += 1
        return False
    progress.kept, progress.num_worse = dict(row), 0
    return True


def _number(loss: float) -> float:
    """Return the loss for comparison; NaN is worse than any number."""
    return math.inf if math.isnan(loss) else loss
