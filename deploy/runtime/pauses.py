"""Says when a run pauses because rewards are missing, what is missing, and when it goes on. Changes nothing."""

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
    """Ask this process (`own`) and the actors now and then whether they wait for rewards; `note` what the first says,
    once. Never ends."""
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
    """Say pauses of this process alone while the block runs."""
    watching = asyncio.create_task(watch_rewards(lambda: (), own, note))
    try:
        yield
    finally:
        watching.cancel()


async def first_missing(actors: Iterable[RemoteActor]) -> str | None:
    """What the first of them says that waits for rewards; None where none does."""
    for actor in list(actors):
        try:
            missing: str | None = await within(
                actor.missing_rewards(), ANSWER_TIMEOUT_S, where=actor.name, waited_for="it to say what it waits for"
            )
        except (ActorDied, DeadlineExceeded):  # its supervisor says so
            continue
        if missing:
            return missing
    return None
