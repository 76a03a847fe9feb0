"""From sampled responses to scored trajectories in the queue, a wave at a time.

Groups whose responses end within GATHER_S of each other are scored with one call and put with one call: every call
takes the interpreter away from the engine's thread. Waves do not wait for each other and sampling does not wait for
them, so a slow scorer holds up nobody. A group that cannot be scored is voided. Knows neither engine nor weights.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from typing import NamedTuple, Protocol

from cluster.errors import RewardError, RewardUnavailable
from cluster.scoring import Score, ScoreRequest
from cluster.trajectory import FinishedGroup, Ticket, Trajectory
from rollout_actors.conversations.conversation import Conversation, score_request
from rollout_actors.prompts import PromptTokenizer
from rollout_actors.reward_client import RewardClient

GATHER_S = 0.05
"""How long a sampled group may wait for others to be scored with; nothing waits once nothing more is being sampled."""


class TakesFinishedGroups(Protocol):
    """The queue, as deliveries see it."""

    def put(self, groups: Sequence[FinishedGroup]) -> Awaitable[None]:
        """Take all of these groups, or raise."""

    def void(self, ticket: Ticket, reason: str) -> Awaitable[None]:
        """Give a group up, or raise where too many are."""


class SampledGroup(NamedTuple):
    """A group whose conversations are all over."""

    ticket: Ticket
    conversations: Sequence[Conversation]


class Deliveries:
    """Scores and puts the groups of one rollout actor."""

    def __init__(self, tokenizer: PromptTokenizer, queue: TakesFinishedGroups, rewards: RewardClient) -> None:
        self._tokenizer = tokenizer
        self._queue = queue
        self._rewards = rewards
        self._gathering: list[SampledGroup] = []
        self._timer: asyncio.TimerHandle | None = None
        self._waves: set[asyncio.Task[None]] = set()
        self._failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def add(self, ticket: Ticket, conversations: Sequence[Conversation]) -> None:
        """Take a group whose responses are sampled; it is scored and put with those that come soon after it."""
        self._gathering.append(SampledGroup(ticket, conversations))
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(GATHER_S, self.flush)

    def flush(self) -> None:
        """Score and put what has been gathered, now: nothing more will come soon."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._gathering:
            wave = asyncio.create_task(self._deliver(self._gathering))
            self._gathering = []
            self._waves.add(wave)
            wave.add_done_callback(self._ended)

    def _ended(self, wave: asyncio.Task[None]) -> None:
        self._waves.discard(wave)
        error = None if wave.cancelled() else wave.exception()
        if error is not None and not self._failed.done():
            self._failed.set_exception(error)

    async def failed(self) -> None:
        """Wait for the first wave that fails and raise its error; for ever where none does.

        RewardUnavailable where the service is not waited for any longer, GroupsVoided where too many groups cannot be
        scored, TrajectoryRefused where the queue refuses one.
        """
        await asyncio.shield(self._failed)

    async def _deliver(self, wave: Sequence[SampledGroup]) -> None:
        """Put the groups whose responses all have rewards, void the others. An error for all is each one's own."""
        try:
            outcomes = iter(await self._rewards.outcomes(self._requests(wave)))
        except RewardUnavailable:
            raise
        except RewardError as error:
            if len(wave) == 1:
                await self._queue.void(wave[0].ticket, str(error))
            else:
                await asyncio.gather(*(self._deliver([group]) for group in wave))
            return
        finished = []
        for group in wave:
            judged = [(conversation, next(outcomes)) for conversation in group.conversations]
            errors = [outcome for _, outcome in judged if isinstance(outcome, RewardError)]
            if errors:
                await self._queue.void(group.ticket, str(errors[0]))
                continue
            trajectories = [self._trajectory(group, c, outcome) for c, outcome in judged if isinstance(outcome, Score)]
            finished.append((group.ticket, trajectories))
        if finished:
            await self._queue.put(finished)

    def _requests(self, wave: Sequence[SampledGroup]) -> list[ScoreRequest]:
        held = [(group.ticket, conversation) for group in wave for conversation in group.conversations]
        texts = self._tokenizer.decode([conversation.last_response for _, conversation in held])
        return [
            score_request(conversation, text, ticket.row, task=ticket.task)
            for (ticket, conversation), text in zip(held, texts, strict=True)
        ]

    def _trajectory(self, group: SampledGroup, conversation: Conversation, score: Score) -> Trajectory:
        """The record of one conversation with its rewards."""
        return Trajectory(
            uid=conversation.uid,
            group=group.ticket.group,
            task=group.ticket.task,
            token_ids=conversation.token_ids,
            mask=conversation.mask,
            behavior_logprobs=conversation.logprobs,
            segments=conversation.segments,
            turns=conversation.turns,
            admission_index=group.ticket.admission_index,
            finish_reason=conversation.finish_reason,
            reward=score.reward,
            reward_parts={**conversation.parts, **score.parts},
            scorer_version=score.scorer_version,
        )

    async def cancel(self) -> None:
        """Give up what is gathered and the waves under way; their groups are handed over or lost with their owner."""
        self._gathering = []
        self.flush()
        for wave in list(self._waves):
            wave.cancel()
        await asyncio.gather(*self._waves, return_exceptions=True)
        self._failed.cancel()
