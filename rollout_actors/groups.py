"""Samples the groups of admitted tickets: several responses or conversations for each prompt.

Passes finished groups to `Deliveries`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from cluster.actors.remote import within
from cluster.errors import EnvironmentFault, InputError
from cluster.queue.protocol import ProducerQueue
from cluster.trajectory import PartialResponse, Ticket
from rollout_actors.config import RolloutActorsConfig
from rollout_actors.conversations.conversation import environment_seed, single_turn
from rollout_actors.conversations.dialogue import ProgressSaver
from rollout_actors.conversations.history import differ_by_date
from rollout_actors.conversations.runner import Conversations
from rollout_actors.delivery import Deliveries
from rollout_actors.engine.response import ResponseRequest, SampledResponse, SamplingOptions
from rollout_actors.engine.thread import EngineThread
from rollout_actors.partials import PartialsSender
from rollout_actors.prompts import PromptTokenizer

FLOOR_TIMEOUT_S = 600.0
"""How long an admitted group waits for its minimum weight version."""


class GroupSampling:
    """Samples groups for the rollout actor `name`.

    `conversations` are keyed by task; prompts of tasks that are not among them get single responses.
    """

    def __init__(
        self,
        name: str,
        config: RolloutActorsConfig,
        engine: EngineThread,
        tokenizer: PromptTokenizer,
        conversations: Mapping[str, Conversations],
        *,
        queue: ProducerQueue,
        partials: PartialsSender,
        deliveries: Deliveries,
        options: SamplingOptions = SamplingOptions(),
    ) -> None:
        self._name = name
        self._config = config
        self._engine = engine
        self._tokenizer = tokenizer
        self._conversations = conversations
        self._queue = queue
        self._partials = partials
        self._deliveries = deliveries
        self._options = options

    def start(self, tickets: Sequence[Ticket]) -> set[asyncio.Future[None]]:
        """Start sampling the groups of these tickets and return one task per group."""
        single = [
            replace(ticket, row=self._tokenizer.ready(ticket.row))
            for ticket in tickets
            if ticket.task not in self._conversations
        ]
        prompts = self._tokenizer.encode([ticket.row["prompt"] for ticket in single])
        groups = [self._sample_group(ticket, prompt) for ticket, prompt in zip(single, prompts, strict=True)]
        for ticket in tickets:
            if ticket.task in self._conversations:
                groups.append(self._converse(self._conversations[ticket.task], ticket))
        return {asyncio.ensure_future(group) for group in groups}

    async def _reached_floor(self, ticket: Ticket) -> int:
        """Wait until the group's minimum weight version is loaded, and return it."""
        floor = ticket.min_policy_version
        await within(
            self._engine.loaded(floor),
            FLOOR_TIMEOUT_S,
            where=self._name,
            waited_for=f"weights of version {floor}, the minimum of group {ticket.group}",
        )
        return floor

    async def _converse(self, conversations: Conversations, ticket: Ticket) -> None:
        """Run one group of conversations with the same start; void it if the environment breaks the protocol."""
        floor = await self._reached_floor(ticket)
        begun = {response.uid: response for response in ticket.begun}
        uids = [ticket.uid(index) for index in range(self._config.responses_per_prompt)]
        running = [
            asyncio.ensure_future(
                conversations.run(
                    uid,
                    ticket.row,
                    seed=environment_seed(f"{ticket.run_seed}-{ticket.group}"),
                    temperature=self._config.temperature,
                    min_policy_version=floor,
                    max_segment_tokens=self._config.max_segment_tokens,
                    begun=begun.get(uid),
                    on_progress=self._saver(ticket).update,
                )
            )
            for uid in uids
        ]
        try:
            finished = await asyncio.gather(*running)
            self._partials.drop(ticket)
            self._deliveries.add(ticket, finished)
        except EnvironmentFault as fault:
            await cancelled(set(running))
            await self._queue.void(ticket, str(fault))

    def _saver(self, ticket: Ticket) -> ProgressSaver:
        """Return what saves a conversation's turns, so that an actor's death loses only the last ones."""

        def save(response: PartialResponse) -> None:
            self._partials.add(ticket, response.given[0], response)

        return ProgressSaver(save, every_tokens=self._config.max_segment_tokens)

    async def _sample_group(self, ticket: Ticket, prompt_token_ids: Sequence[int]) -> None:
        """Sample the missing parts of one group's responses and deliver the group."""
        prompt_token_ids = self._kept_prompt(ticket, prompt_token_ids)
        floor = await self._reached_floor(ticket)
        begun = {response.uid: response for response in ticket.begun}
        uids = [ticket.uid(index) for index in range(self._config.responses_per_prompt)]
        save = partial(self._partials.add, ticket, prompt_token_ids)
        responses = await asyncio.gather(
            *(self._sample(uid, prompt_token_ids, floor, begun.get(uid), save) for uid in uids)
        )
        self._partials.drop(ticket)
        self._deliveries.add(ticket, [single_turn(ticket.row["prompt"], prompt_token_ids, r) for r in responses])

    def _kept_prompt(self, ticket: Ticket, prompt_token_ids: Sequence[int]) -> Sequence[int]:
        """Return the prompt of the group's kept responses, or `prompt_token_ids` if it has none.

        The two may differ by the date that a chat template writes. Raises InputError if they differ otherwise: a kept
        response belongs to its own prompt.
        """
        kept = next((response.given[0] for response in ticket.begun if response.given), None)
        if kept is None or list(kept) == list(prompt_token_ids):
            return prompt_token_ids
        if differ_by_date(self._tokenizer.tokenizer, prompt_token_ids, kept):
            return kept
        what = (
            f"group {ticket.group} has responses to a prompt of {len(kept)} tokens, but its row now gives another one "
            f"({len(prompt_token_ids)} tokens): restore the data set, tokenizer and chat template, or use --fresh"
        )
        raise InputError("data.prompts", what)

    async def _sample(
        self,
        uid: str,
        prompt_token_ids: Sequence[int],
        floor: int,
        begun: PartialResponse | None,
        on_closed: Callable[[PartialResponse], None],
    ) -> SampledResponse:
        """Sample one response, from its first token or from where another actor stopped."""
        if begun is not None and begun.finish_reason is not None:
            return SampledResponse(uid, begun.token_ids, begun.logprobs, begun.segments, begun.finish_reason)
        request = ResponseRequest(
            uid,
            prompt_token_ids,
            self._config.max_response_tokens,
            self._config.temperature,
            floor,
            max_segment_tokens=self._config.max_segment_tokens,
            begun=begun,
            options=self._options,
            on_closed=on_closed,
        )
        return await self._engine.sample(request)


async def cancelled(tasks: set[asyncio.Future[Any]]) -> None:
    """Cancel the tasks and wait until they end.

    Ignores their errors: they were raised before or no longer matter.
    """
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
