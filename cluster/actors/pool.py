"""Keep a changing set of actors running and replace those that fail.

A failed actor is replaced after its work was handed over, up to a number of restarts per hour, after a pause that grows
if it fails again soon. An actor that does not answer its probes has failed. A failure beyond the budget, or the loss of
the last actor, ends the run with that actor's error. If an actor cannot start because no machine has room, the pool
prints a note and continues without it.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from typing import Any

from cluster.actors.health import Health, State
from cluster.actors.remote import RemoteActor
from cluster.errors import ActorDied, AntiphonError, DeadlineExceeded, EngineError, WeightsRefused

HEALED = (ActorDied, EngineError, WeightsRefused)
BUDGET_WINDOW_S = 3600.0
BACKOFF_S, LONGEST_BACKOFF_S = 1.0, 60.0
"""Pause before a restart that follows another within LONGEST_BACKOFF_S; doubled for each one more."""


class ActorPool:
    """Starts, resizes and stops a set of actors; `supervise` runs their work.

    `start(name)` returns a ready actor; `stop(actor)` ends its process; names are never used twice. If `health` is
    given, every working actor is probed.
    """

    def __init__(
        self,
        start: Callable[[str], Awaitable[RemoteActor]],
        stop: Callable[[RemoteActor], Awaitable[None]],
        *,
        name: str,
        max_restarts: int,
        note: Callable[[str], None],
        health: Health | None = None,
    ) -> None:
        self._start = start
        self.health = health
        self._stop = stop
        self._name = name
        self._max_restarts = max_restarts
        self._note = note
        self._num_started = 0
        self._restarts: dict[str, list[float]] = {}
        self._joined = asyncio.Condition()
        self._supervised = False
        self.is_dismissed = False
        self.actors: list[RemoteActor] = []

    async def fill(self, num: int) -> None:
        """Start actors until there are `num`."""
        await self.add(num - len(self.actors))

    async def add(self, num: int) -> list[RemoteActor]:
        """Start `num` more actors concurrently. Raises the error of one that fails to start."""
        started = list(await asyncio.gather(*(self._start(self._next_name()) for _ in range(num))))
        await self._join(started)
        return started

    async def add_with_room(self, num: int) -> list[RemoteActor]:
        """Like `add`, but an actor that does not start in time is left out, with a note."""
        started: list[RemoteActor] = []
        for outcome in await asyncio.gather(*(self.add(1) for _ in range(num)), return_exceptions=True):
            if isinstance(outcome, DeadlineExceeded):
                self.do_without(outcome)
            elif isinstance(outcome, BaseException):
                raise outcome
            else:
                started += outcome
        return started

    def do_without(self, error: DeadlineExceeded) -> None:
        """Continue with the running actors, with a note. Raises the error if there is none."""
        if not self.actors:
            raise error
        self._note(f"{error}; the run continues with {len(self.actors)}")

    async def _join(self, actors: list[RemoteActor]) -> None:
        async with self._joined:
            self.actors += actors
            self._joined.notify_all()

    async def ask(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Call a method of the first healthy actor; if it fails while the pool is supervised, retry on another one.

        Waits for a replacement if all have failed (woken when it starts).
        """
        failed: set[str] = set()
        while True:
            async with self._joined:
                await self._joined.wait_for(lambda: any(actor.name not in failed for actor in self.actors))
            there = [actor for actor in self.actors if actor.name not in failed]
            actor = next((actor for actor in there if not self._is_suspect(actor)), there[0])
            try:
                return await getattr(actor, method)(*args, **kwargs)
            except HEALED:
                if not self._supervised:
                    raise
                failed.add(actor.name)

    def _is_suspect(self, actor: RemoteActor) -> bool:
        return self.health is not None and self.health.states.get(actor.name) == State.SUSPECT

    def _next_name(self) -> str:
        name = f"{self._name}-{self._num_started}"
        self._num_started += 1
        return name

    async def supervise(
        self,
        work: Callable[[RemoteActor], Awaitable[None]],
        *,
        lost: Callable[[str], Awaitable[None]],
        wanted: Callable[[int], Awaitable[int]],
    ) -> None:
        """Run `work` on every actor until all calls have returned, which they do after `dismiss`.

        `wanted(n)` waits until a number other than n is requested and returns it: actors are then added, or asked to
        stop. `lost(name)` takes back what a failed actor held, before its replacement starts. Raises the first error
        that the policy does not handle.
        """
        workers = _Workers(self, work, lost)
        resizing = asyncio.create_task(workers.follow(wanted))
        self._supervised, self.is_dismissed = True, False
        try:
            for actor in self.actors:
                workers.start(actor)
            await workers.all_done(resizing)
        finally:
            self._supervised = False
            resizing.cancel()
            workers.dismiss()
            await asyncio.gather(resizing, return_exceptions=True)

    async def replace(self, actor: RemoteActor, error: AntiphonError) -> RemoteActor:
        """Start a new actor for a failed one. Raises the failed one's error if its restart budget is spent."""
        self.actors.remove(actor)
        await self._stop(actor)
        slot, now = actor.name.split("+")[0], time.monotonic()
        restarts = self._restarts.setdefault(slot, [])
        if sum(now - at < BUDGET_WINDOW_S for at in restarts) >= self._max_restarts:
            raise error
        num_lately = sum(now - at < LONGEST_BACKOFF_S for at in restarts)
        restarts.append(now)
        self._note(f"{actor.name} failed ({error.what}); starting it again")
        if num_lately:
            await asyncio.sleep(min(BACKOFF_S * 2 ** (num_lately - 1), LONGEST_BACKOFF_S))
        replacement = await self._start(f"{slot}+{len(restarts)}")
        await self._join([replacement])
        return replacement

    async def dismiss(self) -> None:
        """Ask every actor to stop its work, which ends `supervise`; the processes stay, also starting ones."""
        self.is_dismissed = True
        await asyncio.gather(*(_ask_to_stop(actor) for actor in list(self.actors)))

    async def close(self) -> None:
        """End every actor's process."""
        actors, self.actors = self.actors, []
        await asyncio.gather(*(self._stop(actor) for actor in actors))

    async def discharge(self, actor: RemoteActor) -> None:
        """End the process of an actor that has stopped its work."""
        self.actors.remove(actor)
        await self._stop(actor)


class _Workers:
    """The tasks of one `supervise` call: one per actor, from its start until its work returns."""

    def __init__(
        self,
        pool: ActorPool,
        work: Callable[[RemoteActor], Awaitable[None]],
        lost: Callable[[str], Awaitable[None]],
    ) -> None:
        self._pool = pool
        self._work = work
        self._lost = lost
        self._tasks: set[asyncio.Task[None]] = set()
        self._leaving: set[str] = set()

    def start(self, actor: RemoteActor) -> None:
        self._tasks.add(asyncio.create_task(self._run(actor)))

    async def _run(self, actor: RemoteActor) -> None:
        while not self._pool.is_dismissed:
            try:
                await self._work_probed(actor)
            except HEALED as error:
                await self._lost(actor.name)
                if actor.name in self._leaving or self._pool.is_dismissed:
                    await self._pool.discharge(actor)
                    return
                try:
                    actor = await self._pool.replace(actor, error)
                except DeadlineExceeded as late:
                    self._pool.do_without(late)
                    return
            else:
                if actor.name in self._leaving:
                    await self._pool.discharge(actor)
                return

    async def _work_probed(self, actor: RemoteActor) -> None:
        """Run the actor's work; raise ActorDied if it does not answer its probes."""
        health = self._pool.health
        if health is None:
            return await self._work(actor)
        work, probes = asyncio.ensure_future(self._work(actor)), asyncio.ensure_future(health.watch(actor))
        try:
            await asyncio.wait({work, probes}, return_when=asyncio.FIRST_COMPLETED)
            (work if work.done() else probes).result()
        finally:
            for task in (work, probes):
                task.cancel()
            await asyncio.gather(work, probes, return_exceptions=True)
            health.states.pop(actor.name, None)

    async def follow(self, wanted: Callable[[int], Awaitable[int]]) -> None:
        """Resize the pool whenever another number is requested, until cancelled."""
        num = len(self._pool.actors)
        while True:
            num = await wanted(num)
            staying = [actor for actor in self._pool.actors if actor.name not in self._leaving]
            for actor in staying[num:]:
                self._leaving.add(actor.name)
                await _ask_to_stop(actor)
            for actor in await self._pool.add_with_room(num - len(staying)):
                self.start(actor)

    async def all_done(self, resizing: asyncio.Task[Any]) -> None:
        """Wait for every actor's task, including actors added meanwhile. Raises the first error."""
        while self._tasks:
            done, _ = await asyncio.wait({*self._tasks, resizing}, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
                self._tasks.discard(task)

    def dismiss(self) -> None:
        for task in self._tasks:
            task.cancel()


async def _ask_to_stop(actor: RemoteActor) -> None:
    """Ask an actor to stop its work. A dead one has stopped already; its supervision handles that."""
    with contextlib.suppress(ActorDied):
        await actor.stop()
