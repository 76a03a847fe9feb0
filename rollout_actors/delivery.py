"""Scores sampled groups and puts them into the queue, in waves.

Groups that finish within GATHER_S of each other share one call to the scorer and one to the queue, because every call
takes the interpreter from the engine's thread. Waves run concurrently with each other and with sampling, so a slow
scorer delays neither. A group that cannot be scored is voided.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import NamedTuple

from cluster.errors import BatchFailed, RewardError, RewardUnavailable
from cluster.queue.protocol import ProducerQueue
from cluster.scoring import Score, ScoreRequest, with_trainer_state
from cluster.trajectory import Ticket, Trajectory
from rollout_actors.conversations.conversation import Conversation, score_request
from rollout_actors.prompts import PromptTokenizer
from rollout_actors.reward_client import RewardClient

GATHER_S = 0.05
"""How long a sampled group waits for others of its wave, if others are being sampled."""


class SampledGroup(NamedTuple):
    """A group whose conversations are all finished."""

    ticket: Ticket
    conversations: Sequence[Conversation]


class Deliveries:
    """Scores the groups of one rollout actor and puts them into the queue."""

    def __init__(self, tokenizer: PromptTokenizer, queue: ProducerQueue, rewards: RewardClient) -> None:
        self._tokenizer = tokenizer
        self._queue = queue
        self._rewards = rewards
        self._gathering: list[SampledGroup] = []
        self._timer: asyncio.TimerHandle | None = None
        self._waves: set[asyncio.Task[None]] = set()
        self._failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def add(self, ticket: Ticket, conversations: Sequence[Conversation]) -> None:
        """Deliver a sampled group, with those that follow within GATHER_S."""
        self._gathering.append(SampledGroup(ticket, conversations))
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(GATHER_S, self.flush)

    def flush(self) -> None:
        """Deliver the gathered groups now. Call it if nothing else is being sampled."""
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
        """Wait until a delivery fails, then raise its error. Does not return otherwise.

        Raises RewardUnavailable if the wait for the service has timed out, GroupsVoided if too many groups cannot be
        scored, TrajectoryRefused if the queue refuses one.
        """
        await asyncio.shield(self._failed)

    async def _deliver(self, wave: Sequence[SampledGroup]) -> None:
        """Put the groups whose responses all have rewards; void the others.

        If the scorer fails on the whole wave, every group is delivered alone, to find out which ones it refuses.
        """
        try:
            scored: Sequence[Score | RewardError] = await self._rewards.outcomes(self._requests(wave))
        except RewardUnavailable:
            raise
        except RewardError as error:
            scored = [BatchFailed(error.where, error.what)] * sum(len(group.conversations) for group in wave)
        if len(wave) > 1 and any(isinstance(outcome, BatchFailed) for outcome in scored):
            await asyncio.gather(*(self._deliver([group]) for group in wave))
            return
        outcomes, finished = iter(scored), []
        for group in wave:
            pairs = [(conversation, next(outcomes)) for conversation in group.conversations]
            errors = [outcome for _, outcome in pairs if isinstance(outcome, RewardError)]
            if errors:
                await self._queue.void(group.ticket, str(errors[0]))
                continue
            trajectories = [self._trajectory(group, c, outcome) for c, outcome in pairs if isinstance(outcome, Score)]
            finished.append((group.ticket, trajectories))
        if finished:
            await self._queue.put(finished)

    def _requests(self, wave: Sequence[SampledGroup]) -> list[ScoreRequest]:
        delivered = [(group.ticket, conversation) for group in wave for conversation in group.conversations]
        texts = self._tokenizer.decode(
            [conversation.last_response for _, conversation in delivered],
            [conversation.last_context for _, conversation in delivered],
        )
        return [
            with_trainer_state(
                score_request(conversation, text, ticket.row, task=ticket.task),
                global_step=ticket.num_steps_before,
                max_steps=ticket.num_steps,
            )
            for (ticket, conversation), text in zip(delivered, texts, strict=True)
        ]

    def _trajectory(self, group: SampledGroup, conversation: Conversation, score: Score) -> Trajectory:
        """Return the trajectory of a scored conversation."""
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
            sequence_starts=conversation.sequence_starts,
        )

    async def cancel(self) -> None:
        """Drop the gathered groups and cancel the running waves.

        The queue gives their groups to other actors.
        """
        self._gathering = []
        self.flush()
        for wave in list(self._waves):
            wave.cancel()
        await asyncio.gather(*self._waves, return_exceptions=True)
        self._failed.cancel()
