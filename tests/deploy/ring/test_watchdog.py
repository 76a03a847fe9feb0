"""The watchdog: what moves keeps a run alive, what does not ends it with everybody's words."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from itertools import chain, count, repeat

import pytest

from cluster.errors import DeadlineExceeded
from deploy.ring.calls import ToldCalls
from deploy.ring.watchdog import watch
from learner.training_loop import Groups, StepResult


async def said() -> str:
    return "the training loop waits for the groups of step 7"


async def watched(answers: Iterator[object], *, num_looks: int) -> None:
    """The watchdog over a second a look, for so many looks."""
    clock = count()
    looks = iter(range(num_looks))

    async def progress() -> object:
        if next(looks, None) is None:
            raise asyncio.CancelledError
        return next(answers)

    await watch(progress, said, timeout_s=20, every_s=0, clock=lambda: next(clock))


async def test_a_run_that_moves_now_and_then_goes_on() -> None:
    slowly = chain.from_iterable(repeat(number, 5) for number in count())
    with pytest.raises(asyncio.CancelledError):
        await watched(slowly, num_looks=200)


async def test_a_run_in_which_nothing_moves_ends_with_what_everybody_waits_for() -> None:
    with pytest.raises(
        DeadlineExceeded,
        match=r"nothing moved for 20 s \(run.progress_timeout_s\): the training loop waits for the groups",
    ):
        await watched(chain(range(3), repeat("the same")), num_looks=200)


async def test_the_training_loops_call_is_told_while_it_is_under_way() -> None:
    class Learners:
        async def step(self, step: int, groups: Groups) -> StepResult:
            told.append(calls.waits_for)
            return None  # type: ignore[return-value]

    told: list[str] = []
    calls = ToldCalls(None, Learners(), None)  # type: ignore[arg-type]
    await calls.step(3, [])
    assert (told, calls.num_calls) == (["the learner group to train step 3"], 1)
