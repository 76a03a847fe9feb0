"""The learner group of a supervised stage as the driver calls it: a stream of metrics."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Self

from learner.distributed.calls import GroupCalls
from learner.distributed.group import build
from learner.supervised.loop import Row
from learner.supervised.rank import SupervisedSettings
from learner.supervised.rllib import SupervisedLearner

CALL_S = 0.5
"""How long a call should take: long against its overhead of milliseconds, short enough for a live view."""


class SupervisedLearnerGroup(GroupCalls):
    """Calls the learners of a supervised stage."""

    @classmethod
    async def start(cls, settings: SupervisedSettings) -> Self:
        """Start the ranks with their models and data.

        Raises the error of a rank that failed, or DeadlineExceeded.
        """
        return cls(await build(settings, SupervisedLearner), settings.config)

    async def train(self) -> AsyncIterator[Row]:
        """Train to the end, from the newest checkpoint if there is one, and write the model.

        Yields the examples' counts first, then the metrics of each step, and the model's measurements last.
        """
        yield (await self.call_rank("counts"))[0]
        num, started, rows = 1, time.monotonic(), list[Row]()
        while len(rows := (await self.call_rank("advance", num))[0]) == num:
            for row in rows:
                yield row
            num = _next_num(num, time.monotonic() - started)
            started = time.monotonic()
        for row in rows:
            yield row
        yield (await self.call_rank("finish"))[0]


def _next_num(num: int, took_s: float) -> int:
    """Return the number of steps for the next call, given that `num` took `took_s`.

    The result is at most twice `num`.
    """
    return max(1, min(2 * num, int(num * CALL_S / took_s)))
