"""Order the prompts: each task's rows shuffled by the seed or in file order, the tasks mixed by their weights.

The order depends only on the seed and the prompt's number, so a resumed run gets the same prompts.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

Row = Mapping[str, Any]


def mixed(weights: Sequence[float]) -> Iterator[int]:
    """Yield, without end, the index of the source that is furthest below its share.

    On a tie, the first. No source is ever a whole draw ahead of its share, so a stretch of any length has about
    as much of each as the weights say.
    """
    total = sum(weights)
    shares, counts, num = [weight / total for weight in weights], [0] * len(weights), 0
    while True:
        num += 1
        source = max(range(len(shares)), key=lambda place: shares[place] * num - counts[place])
        counts[source] += 1
        yield source


class PromptOrder:
    """Maps prompt numbers to data rows: one seeded permutation of the rows per epoch, or always the rows' own order."""

    def __init__(self, rows: Sequence[Row], seed: int | str, *, shuffle: bool = True) -> None:
        self._rows = rows
        self._shuffle = shuffle
        self._seed = seed
        self._epoch = -1
        self._permutation: list[int] = []

    def row(self, group: int) -> Row:
        epoch, place = divmod(group, len(self._rows))
        if not self._shuffle:
            return self._rows[place]
        if epoch != self._epoch:
            self._permutation = list(range(len(self._rows)))
            random.Random(f"prompts:{self._seed}:{epoch}").shuffle(self._permutation)
            self._epoch = epoch
        return self._rows[self._permutation[place]]


class TaskPrompts(NamedTuple):
    """The prompts of one task, their weight among the tasks, and whether they are shuffled."""

    task: str
    rows: Sequence[Row]
    weight: float = 1.0
    shuffle: bool = True


class Prompt(NamedTuple):
    """A data row and the name of its task."""

    task: str
    row: Row


class MixedPrompts:
    """Maps prompt numbers to a task and one of its rows; stores ten bytes per prompt so far."""

    def __init__(self, tasks: Sequence[TaskPrompts], seed: int) -> None:
        self._names = [task.task for task in tasks]
        alone = len(tasks) == 1
        self._orders = [
            PromptOrder(task.rows, seed if alone else f"{seed}:{task.task}", shuffle=task.shuffle) for task in tasks
        ]
        self._draws = mixed([task.weight for task in tasks])
        self._counts = [0] * len(tasks)
        self._sources, self._places = array("H"), array("Q")

    def prompt(self, group: int) -> Prompt:
        """Return the prompt with this number."""
        while len(self._places) <= group:
            source = next(self._draws)
            self._sources.append(source)
            self._places.append(self._counts[source])
            self._counts[source] += 1
        source = self._sources[group]
        return Prompt(self._names[source], self._orders[source].row(self._places[group]))
