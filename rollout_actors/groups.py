"""The groups of admitted tickets, sampled: each prompt answered so many times, or talked about with an environment.

Hands what is sampled to the deliveries. Knows neither rewards nor where weights come from.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

from cluster.actors.remote import within
from cluster.errors import EnvironmentFault
from cluster.trajectory import PartialResponse, Ticket
from rollout_actors.config import RolloutActorsConfig
from rollout_actors.conversations.conversation import environment_seed, single_turn
from rollout_actors.conversations.dialogue import Keeping
from rollout_actors.conversations.runner import Conversations
from rollout_actors.delivery import Deliveries
from rollout_actors.engine.response import SampledResponse
from rollout_actors.engine.thread import EngineThread
from rollout_actors.partials import Safekeeping
from rollout_actors.prompts import PromptTokenizer

FLOOR_TIMEOUT_S = 600.0
"""How long an admitted group waits for the weights it must not be older than."""


class Voids(Protocol):
    """The queue, as it is seen here."""

    def void(self, ticket: Ticket, reason: str) -> Awaitable[None]:
        """Give a group up, or raise where too many are."""


class GroupSampling:
    """Samples for one rollout actor, whose `name` it bears; `conversations` are those of each task that holds some."""

    def __init__(
        self,
        name: str,
        config: RolloutActorsConfig,
        engine: EngineThread,
        tokenizer: PromptTokenizer,
        conversations: Mapping[str, Conversations],
        *,
        queue: Voids,
        safekeeping: Safekeeping,
        deliveries: Deliveries,
    ) -> None:
        self._name = name
        self._config = config
        self._engine = engine
        self._tokenizer = tokenizer
        self._conversations = conversations
        self._queue = queue
        self._safekeeping = safekeeping
        self._deliveries = deliveries

    def begin(self, tickets: Sequence[Ticket]) -> set[asyncio.Future[None]]:
        """The groups of these tickets under way: each prompt answered, or talked about with an environment."""
        answered = [ticket for ticket in tickets if ticket.task not in self._conversations]
        prompts = self._tokenizer.encode([ticket.row["prompt"] for ticket in answered])
        under_way = [self._roll_out(*of) for of in zip(answered, prompts, strict=True)]
        for ticket in tickets:
            if ticket.task in self._conversations:
                under_way.append(self._converse(self._conversations[ticket.task], ticket))
        return {asyncio.ensure_future(one) for one in under_way}

    async def _reached_floor(self, ticket: Ticket) -> int:
        """Wait until weights that the group may be sampled with are loaded; the oldest such version."""
        floor = ticket.min_policy_version
        await within(
            self._engine.loaded(floor),
            FLOOR_TIMEOUT_S,
            where=self._name,
            waited_for=f"weights of version {floor}, which group {ticket.group} must not be older than",
        )
        return floor

    async def _converse(self, conversations: Conversations, ticket: Ticket) -> None:
        """One group of conversations that begin alike; it is voided where the environment breaks its protocol."""
        floor = await self._reached_floor(ticket)
        begun = {response.uid: response for response in ticket.begun}
        uids = [ticket.uid(index) for index in range(self._config.responses_per_prompt)]
        holding = [
            asyncio.ensure_future(
                conversations.hold(
                    uid,
                    ticket.row,
                    seed=environment_seed(f"{ticket.run_seed}-{ticket.group}"),
                    temperature=self._config.temperature,
                    min_policy_version=floor,
                    max_segment_tokens=self._config.max_segment_tokens,
                    begun=begun.get(uid),
                    keep=self._keeping(ticket),
                )
            )
            for uid in uids
        ]
        try:
            held = await asyncio.gather(*holding)
            self._safekeeping.sampled(ticket)
            self._deliveries.add(ticket, held)
        except EnvironmentFault as fault:
            await cancelled(set(holding))
            await self._queue.void(ticket, str(fault))

    def _keeping(self, ticket: Ticket) -> Keeping:
        """What hears of a conversation's turns, so that the actor's death costs no more than of a single turn."""

        def closed(response: PartialResponse) -> None:
            self._safekeeping.closed(ticket, response.given[0], response)

        return Keeping(closed, every_tokens=self._config.max_segment_tokens)

    async def _roll_out(self, ticket: Ticket, prompt_token_ids: Sequence[int]) -> None:
        """One group: sample what is missing of its responses and hand them to the deliveries."""
        floor = await self._reached_floor(ticket)
        begun = {response.uid: response for response in ticket.begun}
        uids = [ticket.uid(index) for index in range(self._config.responses_per_prompt)]
        hear = partial(self._safekeeping.closed, ticket, prompt_token_ids)
        responses = await asyncio.gather(
            *(self._go_on(uid, prompt_token_ids, floor, begun.get(uid), hear) for uid in uids)
        )
        self._safekeeping.sampled(ticket)
        self._deliveries.add(ticket, [single_turn(ticket.row["prompt"], prompt_token_ids, r) for r in responses])

    async def _go_on(
        self,
        uid: str,
        prompt_token_ids: Sequence[int],
        floor: int,
        begun: PartialResponse | None,
        on_closed: Callable[[PartialResponse], None],
    ) -> SampledResponse:
        """A response for training, from its first token or from where others have left it."""
        if begun is not None and begun.finish_reason is not None:
            return SampledResponse(uid, begun.token_ids, begun.logprobs, begun.segments, begun.finish_reason)
        return await self._engine.sample(
            uid,
            prompt_token_ids,
            max_tokens=self._config.max_response_tokens,
            temperature=self._config.temperature,
            min_policy_version=floor,
            max_segment_tokens=self._config.max_segment_tokens,
            begun=begun,
            on_closed=on_closed,
        )


async def cancelled(tasks: set[asyncio.Future[Any]]) -> None:
    """Cancel the tasks and wait for their ends; what they raise was raised already or no longer matters."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
