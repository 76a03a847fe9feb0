"""The watchdog ends a run without progress and says what each part waited for."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from itertools import chain, count, repeat

import pytest

from cluster.errors import DeadlineExceeded
from deploy.ring import watchdog
from deploy.ring.watchdog import watch


async def describe() -> str:
    return "the training loop waits for the groups of step 7"


async def watched(answers: Iterator[object], *, num_looks: int) -> None:
    """Run the watchdog for `num_looks` looks, one second apart."""
    clock = count()
    looks = iter(range(num_looks))

    async def progress() -> object:
        if next(looks, None) is None:
            raise asyncio.CancelledError
        return next(answers)

    await watch(progress, describe, timeout_s=20, every_s=0, clock=lambda: next(clock))


async def test_a_run_with_occasional_progress_is_not_ended() -> None:
    slowly = chain.from_iterable(repeat(number, 5) for number in count())
    with pytest.raises(asyncio.CancelledError):
        await watched(slowly, num_looks=200)


async def test_a_run_without_progress_ends_with_what_each_part_waits_for() -> None:
    with pytest.raises(
        DeadlineExceeded,
        match=r"nothing moved for 20 s \(run.progress_timeout_s\): the training loop waits for the groups",
    ):
        await watched(chain(range(3), repeat("the same")), num_looks=200)


async def test_parts_that_do_not_answer_are_reported_after_a_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    async def hang() -> str:
        await asyncio.Event().wait()
        return ""

    monkeypatch.setattr(watchdog, "ANSWER_TIMEOUT_S", 0.01)
    clock = count()
    with pytest.raises(DeadlineExceeded, match="its parts did not answer within"):
        await watch(hang, hang, timeout_s=3, every_s=0, clock=lambda: next(clock))
