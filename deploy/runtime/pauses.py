"""Reports when a run pauses because rewards are missing, and when it resumes."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterable

from cluster.actors.remote import RemoteActor, within
from cluster.errors import ActorDied, DeadlineExceeded

LOOK_EVERY_S = 2.0
ANSWER_TIMEOUT_S = 30.0


async def watch_rewards(
    actors: Callable[[], Iterable[RemoteActor]], own: Callable[[], str | None], note: Callable[[str], None]
) -> None:
    """Check every few seconds whether this process (`own`) or an actor waits for rewards. Never returns.

    Calls `note` at the start of a pause, with the first missing rewards found, and at its end.
    """
    since: float | None = None
    while True:
        missing = own() or await first_missing(actors())
        if missing and since is None:
            since = time.monotonic()
            note(f"paused: waiting for {missing}")
        elif not missing and since is not None:
            note(f"rewards are back after {time.monotonic() - since:.0f} s")
            since = None
        await asyncio.sleep(LOOK_EVERY_S)


@contextlib.asynccontextmanager
async def pauses_said(own: Callable[[], str | None], note: Callable[[str], None]) -> AsyncIterator[None]:
    """Report pauses of this process only, while the context lasts."""
    watching = asyncio.create_task(watch_rewards(lambda: (), own, note))
    try:
        yield
    finally:
        watching.cancel()


async def first_missing(actors: Iterable[RemoteActor]) -> str | None:
    """Return what the first actor that waits for rewards reports; None if no actor waits."""
    for actor in list(actors):
        try:
            missing: str | None = await within(
                actor.missing_rewards(), ANSWER_TIMEOUT_S, where=actor.name, waited_for="its report on missing rewards"
            )
        except (ActorDied, DeadlineExceeded):  # the actor pool reports it
            continue
        if missing:
            return missing
    return None
