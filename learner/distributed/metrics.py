"""Aggregates the metrics of a step over micro-batches and ranks."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

from learner.distributed.ranks import Ranks


class StepMetrics:
    """Collects the metrics of a step. Every rank must add the same names."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._sums: dict[str, list[Tensor]] = defaultdict(list)
        self._counts: dict[str, int] = defaultdict(int)
        self._maxima: dict[str, list[Tensor]] = defaultdict(list)
        self._constants: dict[str, list[float]] = defaultdict(list)

    def mean(self, name: str, values: Tensor) -> None:
        """Add `values` to the mean over everything added under `name`; 0 if nothing was."""
        self._sums[name].append(values.detach().sum(dtype=torch.float64))
        self._counts[name] += values.numel()

    def max(self, name: str, values: Tensor) -> None:
        """Add `values` to the maximum under `name`; 0 if nothing was added."""
        if values.numel():
            self._maxima[name].append(values.detach().max().double())
        else:
            self._maxima[name].append(values.new_zeros((), dtype=torch.float64))

    def constant(self, name: str, value: float) -> None:
        """Add a value that is the same on all ranks; reported as the mean of the values added."""
        self._constants[name].append(value)

    def metrics(self) -> dict[str, float]:
        """Return all metrics. Collective."""
        sums = torch.stack([torch.stack(values).sum() for values in self._sums.values()])
        counts = sums.new_tensor(list(self._counts.values()))
        sums, counts = self._ranks.all_sum(torch.stack([sums, counts]))
        maxima = self._ranks.all_max(torch.stack([torch.stack(values).max() for values in self._maxima.values()]))
        return {
            **dict(zip(self._sums, (sums / counts.clamp(min=1)).tolist(), strict=True)),
            **dict(zip(self._maxima, maxima.tolist(), strict=True)),
            **{name: sum(values) / len(values) for name, values in self._constants.items()},
        }
