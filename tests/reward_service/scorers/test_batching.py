from __future__ import annotations

import asyncio
import threading

import pytest

from reward_service.scorers.batching import Batcher


class Doubler:
    """Doubles numbers and records its batches; the first batch waits for `go`."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.go = threading.Event()

    def __call__(self, items: list[int]) -> list[int]:
        self.batches.append(items)
        assert self.go.wait(10)
        if -1 in items:
            raise ValueError("negative")
        return [2 * item for item in items]


async def test_calls_during_a_batch_share_the_next_one() -> None:
    doubler = Doubler()
    batcher: Batcher[int, int] = Batcher(doubler, max_batch_size=3)
    calls = [asyncio.create_task(batcher.run([1]))]
    while not doubler.batches:
        await asyncio.sleep(0)
    calls += [asyncio.create_task(batcher.run(items)) for items in ([2, 3], [4, 5])]
    await asyncio.sleep(0)
    doubler.go.set()
    assert await asyncio.gather(*calls) == [[2], [4, 6], [8, 10]]
    assert doubler.batches == [[1], [2, 3, 4], [5]]


async def test_failed_batch_fails_only_its_callers() -> None:
    doubler = Doubler()
    doubler.go.set()
    batcher: Batcher[int, int] = Batcher(doubler, max_batch_size=8)
    with pytest.raises(ValueError, match="negative"):
        await batcher.run([1, -1])
    assert await batcher.run([5]) == [10]


async def test_cancelled_caller_is_not_computed() -> None:
    doubler = Doubler()
    batcher: Batcher[int, int] = Batcher(doubler, max_batch_size=8)
    first = asyncio.create_task(batcher.run([1]))
    while not doubler.batches:
        await asyncio.sleep(0)
    impatient = asyncio.create_task(batcher.run([2]))
    await asyncio.sleep(0)
    impatient.cancel()
    await asyncio.sleep(0)
    doubler.go.set()
    assert await first == [2]
    assert await batcher.run([3]) == [6]
    assert doubler.batches == [[1], [3]]
