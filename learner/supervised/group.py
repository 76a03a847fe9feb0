"""A supervised stage as the driver sees it: a stream of metrics. Knows neither models nor data."""

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
"""How long a call should take, so that its own cost of milliseconds is nothing and a screen still moves."""


class SupervisedLearnerGroup(GroupCalls):
    """The learners of a supervised stage."""

    @classmethod
    async def start(cls, settings: SupervisedSettings) -> Self:
        """Start the ranks with their models and data. Raises the error of one that could not, and DeadlineExceeded."""
        return cls(await build(settings, SupervisedLearner), settings.config)

    async def train(self) -> AsyncIterator[Row]:
        """Train to the end, from the newest checkpoint if there is one, and write the model.

        First of all yields the examples' counts, then the metrics of each step, last what was measured of the model.
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
    """How many steps the next call should have, where `num` took so long; at most twice as many."""
    return max(1, min(2 * num, int(num * CALL_S / took_s)))
