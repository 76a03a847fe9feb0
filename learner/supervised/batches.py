"""Order of batches and held-out rows of the supervised stages."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import accumulate, islice
from pathlib import Path
from typing import TypeVar

import torch

from cluster.data.prompt_order import mixed
from cluster.errors import InputError

T = TypeVar("T")


def shuffled_batches(num_rows: int, batch_size: int, generator: torch.Generator) -> Iterator[list[int]]:
    """Yield row numbers in batches, without end, each pass in a new order; its last batch may be smaller."""
    while True:
        order = torch.randperm(num_rows, generator=generator).tolist()
        for start in range(0, num_rows, batch_size):
            yield order[start : start + batch_size]


def mixed_batches(
    sizes: Sequence[int], weights: Sequence[float], batch_size: int, generator: torch.Generator
) -> Iterator[list[int]]:
    """Yield row numbers in batches, without end, from sources of these sizes.

    Rows are numbered consecutively over the sources. Each source has its own passes, each in a new order, and is drawn
    from in proportion to its weight. A single source is batched as in `shuffled_batches`.
    """
    if len(sizes) == 1:
        yield from shuffled_batches(sizes[0], batch_size, generator)
    starts = [0, *accumulate(sizes)]
    rows = [(number for (number,) in shuffled_batches(size, 1, generator)) for size in sizes]
    sources = mixed(weights)
    while True:
        yield [starts[source] + next(rows[source]) for source in islice(sources, batch_size)]


def split(rows: Sequence[T], share: float, generator: torch.Generator, path: Path) -> tuple[list[T], list[T]]:
    """Split rows into training and held-out rows, at least one of each.

    Raises InputError on a single row.
    """
    if len(rows) < 2:
        raise InputError(str(path), "a single row: one is needed for training and one to be held out")
    order = torch.randperm(len(rows), generator=generator).tolist()
    num_held_out = min(max(1, round(share * len(rows))), len(rows) - 1)
    shuffled = [rows[index] for index in order]
    return shuffled[num_held_out:], shuffled[:num_held_out]


def split_by_draw(rows: Sequence[T], draws: Sequence[float], share: float, path: Path) -> tuple[list[T], list[T]]:
    """Split rows into training and held-out rows: hold out those whose draw in [0, 1) is below the share.

    A held-out row stays held out when rows are added. If one side would be empty, holds out only the rows of the lowest
    draw, or trains only on those of the highest. Raises InputError if all draws are equal.
    """
    if len(set(draws)) < 2:
        raise InputError(str(path), "all pairs have one prompt: one is needed for training and one to be held out")
    limit = min(max(share, _above(min(draws))), max(draws))
    held_out = [draw < limit for draw in draws]
    return (
        [row for row, is_out in zip(rows, held_out, strict=True) if not is_out],
        [row for row, is_out in zip(rows, held_out, strict=True) if is_out],
    )


def _above(number: float) -> float:
    """Return the next larger float."""
    return math.nextafter(number, math.inf)
