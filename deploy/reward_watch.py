"""Says when a run pauses because rewards are missing, what is missing, and when it goes on. Changes nothing."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable

from cluster.errors import ActorDied
from cluster.remote import RemoteActor

LOOK_EVERY_S = 2.0


async def watch_rewards(actors: Callable[[], Iterable[RemoteActor]], note: Callable[[str], None]) -> None:
    """Ask the actors now and then whether they wait for rewards; `note` what the first says, once. Never ends."""
    since: float | None = None
    while True:
        missing = await _first_missing(actors())
        if missing and since is None:
            since = time.monotonic()
            note(f"paused: waiting for {missing}")
        elif not missing and since is not None:
            note(f"rewards are back after {time.monotonic() - since:.0f} s")
            since = None
        await asyncio.sleep(LOOK_EVERY_S)


async def _first_missing(actors: Iterable[RemoteActor]) -> str | None:
    for actor in list(actors):
        try:
            missing: str | None = await actor.missing_rewards()
        except ActorDied:  # its supervisor says so
            continue
        if missing:
            return missing
    return None
