"""Track the health of the actors in a pool, by periodic probes with a deadline.

STARTING until it is ready; STALE while it has nothing to serve with; HEALTHY; SUSPECT after one missed probe, while
calls go to other actors; DEAD after a second missed probe in a row, or if its process has died.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from enum import StrEnum

from cluster.actors.remote import RemoteActor, within
from cluster.errors import ActorDied, AntiphonError, DeadlineExceeded

PROBE_EVERY_S = 5.0
MAX_MISSED_PROBES = 2


class State(StrEnum):
    """Health of an actor."""

    STARTING = "STARTING"
    STALE = "STALE"
    HEALTHY = "HEALTHY"
    SUSPECT = "SUSPECT"
    DEAD = "DEAD"


class Health:
    """Probes actors and holds their states by name. `probe` returns whether an actor has something to serve with."""

    def __init__(
        self,
        probe: Callable[[RemoteActor], Awaitable[bool]],
        *,
        timeout_s: float,
        setting: str,
        note: Callable[[str], None],
        every_s: float = PROBE_EVERY_S,
    ) -> None:
        self._probe = probe
        self._timeout_s = timeout_s
        self._setting = setting
        self._note = note
        self._every_s = every_s
        self.states: dict[str, State] = {}

    def num(self, state: State) -> int:
        """Return the number of actors in a state."""
        return sum(found == state for found in self.states.values())

    async def watch(self, actor: RemoteActor) -> None:
        """Probe a started actor until it is DEAD, then raise the reason: ActorDied if it does not answer."""
        name, num_missed = actor.name, 0
        self.states[name] = State.STALE
        while True:
            try:
                is_ready = await within(self._probe(actor), self._timeout_s, where=name, waited_for="its engine")
            except DeadlineExceeded as error:
                num_missed += 1
                self.states[name] = State.SUSPECT if num_missed < MAX_MISSED_PROBES else State.DEAD
                if num_missed == MAX_MISSED_PROBES:
                    what = f"answered {num_missed} probes not within {self._timeout_s:g} s ({self._setting})"
                    raise ActorDied(name, what) from error
                self._note(f"{name} is suspect: {error.what} ({self._setting})")
                continue
            except AntiphonError:
                self.states[name] = State.DEAD
                raise
            num_missed = 0
            self.states[name] = State.HEALTHY if is_ready else State.STALE
            await asyncio.sleep(self._every_s)
