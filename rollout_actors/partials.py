"""Closed segments of groups under way, sent to the queue, so that the death of an actor costs only the open ones.

Sent a few at a time: a group that is finished soon after one of its segments is sent whole instead, by the deliveries.
Knows neither engine nor rewards.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from typing import Protocol

from cluster.trajectory import PartialGroup, PartialResponse, Ticket

KEEP_EVERY_S = 0.25
"""How long a closed segment may wait for others to be sent with."""


class KeepsBegunGroups(Protocol):
    """The queue, as it is seen here."""

    def keep(self, owner: str, groups: Sequence[PartialGroup]) -> Awaitable[None]:
        """Keep these segments; returns when they are on the disk."""


class Safekeeping:
    """What one rollout actor has closed and not yet sent."""

    def __init__(self, owner: str, queue: KeepsBegunGroups) -> None:
        self._owner = owner
        self._queue = queue
        self._unsent: dict[int, tuple[Ticket, Sequence[int], dict[str, PartialResponse]]] = {}
        self._closed = asyncio.Event()

    def closed(self, ticket: Ticket, prompt_token_ids: Sequence[int], response: PartialResponse) -> None:
        """A segment of this response has been closed."""
        _, _, responses = self._unsent.setdefault(ticket.admission_index, (ticket, prompt_token_ids, {}))
        responses[response.uid] = response
        self._closed.set()

    def sampled(self, ticket: Ticket) -> None:
        """The group's responses are all sampled: they are sent with their rewards."""
        self._unsent.pop(ticket.admission_index, None)

    async def send_now_and_then(self) -> None:
        """Send what is closed, KEEP_EVERY_S after the first of it. Never ends; raises what the queue raises."""
        while True:
            await self._closed.wait()
            await asyncio.sleep(KEEP_EVERY_S)
            await self.send()

    async def send(self) -> None:
        """Send what is closed now."""
        self._closed.clear()
        unsent, self._unsent = self._unsent, {}
        groups = [(ticket, token_ids, list(responses.values())) for ticket, token_ids, responses in unsent.values()]
        if groups:
            await self._queue.keep(self._owner, groups)
