"""Saves finished segments of unfinished groups in the queue.

An actor's death then loses only the open segments. Segments are sent in batches. A group that finishes
before the next batch is not sent here: its delivery contains everything.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from cluster.queue.protocol import ProducerQueue
from cluster.trajectory import PartialResponse, Ticket

KEEP_EVERY_S = 0.25
"""How long a finished segment waits for others, to be sent in one call."""


class PartialsSender:
    """Sends the finished segments of one rollout actor to the queue."""

    def __init__(self, owner: str, queue: ProducerQueue) -> None:
        self._owner = owner
        self._queue = queue
        self._unsent: dict[int, tuple[Ticket, Sequence[int], dict[str, PartialResponse]]] = {}
        self._has_unsent = asyncio.Event()

    def add(self, ticket: Ticket, prompt_token_ids: Sequence[int], response: PartialResponse) -> None:
        """Send this response, of which a segment is finished, with the next batch."""
        _, _, responses = self._unsent.setdefault(ticket.admission_index, (ticket, prompt_token_ids, {}))
        responses[response.uid] = response
        self._has_unsent.set()

    def drop(self, ticket: Ticket) -> None:
        """Send nothing more of this group: all its responses are sampled and will be delivered."""
        self._unsent.pop(ticket.admission_index, None)

    async def send_periodically(self) -> None:
        """Send a batch KEEP_EVERY_S after its first segment. Never returns; raises what the queue raises."""
        while True:
            await self._has_unsent.wait()
            await asyncio.sleep(KEEP_EVERY_S)
            await self.send()

    async def send(self) -> None:
        """Send what is waiting, now."""
        self._has_unsent.clear()
        unsent, self._unsent = self._unsent, {}
        groups = [(ticket, token_ids, list(responses.values())) for ticket, token_ids, responses in unsent.values()]
        if groups:
            await self._queue.keep(self._owner, groups)
