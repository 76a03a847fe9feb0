"""Groups concurrent calls into batches: items that arrive while a batch runs form the next batch.

There is no timer: a single call starts immediately, and batches grow with the load.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class Batcher(Generic[Item, Result]):
    """Runs `function` over at most `max_batch_size` items at a time, in one thread, in order of arrival.

    `function` returns one result per item. Its exception is raised to every caller with an item in that batch.
    """

    def __init__(self, function: Callable[[list[Item]], list[Result]], *, max_batch_size: int) -> None:
        self._function = function
        self._max_batch_size = max_batch_size
        self._waiting: deque[tuple[Item, asyncio.Future[Result]]] = deque()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
        self._running: asyncio.Task[None] | None = None

    async def run(self, items: Sequence[Item]) -> list[Result]:
        """Return the items' results in order; waits for earlier batches first."""
        loop = asyncio.get_running_loop()
        futures = [loop.create_future() for _ in items]
        self._waiting.extend(zip(items, futures, strict=True))
        if self._running is None or self._running.done():
            self._running = loop.create_task(self._drain())
        return list(await asyncio.gather(*futures))

    def close(self) -> None:
        """Let the thread end after its current batch."""
        self._thread.shutdown(wait=False)

    async def _drain(self) -> None:
        loop = asyncio.get_running_loop()
        while batch := self._next_batch():
            items = [item for item, _ in batch]
            try:
                results = await loop.run_in_executor(self._thread, self._function, items)
                answered = list(zip(batch, results, strict=True))
            except asyncio.CancelledError:
                raise
            except BaseException as error:  # noqa: BLE001 not swallowed: every caller of the batch raises it
                for _, future in batch:
                    if not future.done():
                        future.set_exception(error if isinstance(error, Exception) else RuntimeError(repr(error)))
                continue
            for (_, future), result in answered:
                if not future.done():
                    future.set_result(result)

    def _next_batch(self) -> list[tuple[Item, asyncio.Future[Result]]]:
        """Return the oldest items whose callers were not cancelled."""
        batch: list[tuple[Item, asyncio.Future[Result]]] = []
        while self._waiting and len(batch) < self._max_batch_size:
            item, future = self._waiting.popleft()
            if not future.done():
                batch.append((item, future))
        return batch
