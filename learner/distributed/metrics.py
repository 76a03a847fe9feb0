"""Sums up the figures of a step over its pieces and its ranks. Knows none of the figures."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

from learner.distributed.ranks import Ranks


class StepMetrics:
    """The figures of a step, for all ranks at its end. Every rank must tally the same names."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._sums: dict[str, list[Tensor]] = defaultdict(list)
        self._counts: dict[str, int] = defaultdict(int)
        self._maxima: dict[str, list[Tensor]] = defaultdict(list)
        self._constants: dict[str, list[float]] = defaultdict(list)

    def mean(self, name: str, values: Tensor) -> None:
        """Take `values` into the mean over everything tallied under `name`; 0 if that is nothing."""
        self._sums[name].append(values.detach().sum(dtype=torch.float64))
        self._counts[name] += values.numel()

    def max(self, name: str, values: Tensor) -> None:
        """Take `values` into the maximum; 0 if there is none."""
        if values.numel():
            self._maxima[name].append(values.detach().max().double())
        else:
            self._maxima[name].append(values.new_zeros((), dtype=torch.float64))

    def constant(self, name: str, value: float) -> None:
        """A figure that is the same on all ranks; the mean of those given."""
        self._constants[name].append(value)

    def metrics(self) -> dict[str, float]:
        """All figures; waits for the other ranks."""
        sums = torch.stack([torch.stack(values).sum() for values in self._sums.values()])
        counts = sums.new_tensor(list(self._counts.values()))
        sums, counts = self._ranks.all_sum(torch.stack([sums, counts]))
        maxima = self._ranks.all_max(torch.stack([torch.stack(values).max() for values in self._maxima.values()]))
        return {
            **dict(zip(self._sums, (sums / counts.clamp(min=1)).tolist(), strict=True)),
            **dict(zip(self._maxima, maxima.tolist(), strict=True)),
            **{name: sum(values) / len(values) for name, values in self._constants.items()},
        }
