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
from cluster.trajectory import FinishedGroup, Ticket, Trajectory, Turn
from rollout_actors.prompts import PromptTokenizer, scorer_columns
from rollout_actors.responses import SampledResponse, shifted
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
    """A group whose responses are all sampled."""

    ticket: Ticket
    prompt_token_ids: Sequence[int]
    responses: Sequence[SampledResponse]


class Deliveries:
    """Scores and puts the groups of one rollout actor."""

    def __init__(
        self, task: str, tokenizer: PromptTokenizer, queue: TakesFinishedGroups, rewards: RewardClient
    ) -> None:
        self._task = task
        self._tokenizer = tokenizer
        self._queue = queue
        self._rewards = rewards
        self._gathering: list[SampledGroup] = []
        self._timer: asyncio.TimerHandle | None = None
        self._waves: set[asyncio.Task[None]] = set()
        self._failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def add(self, ticket: Ticket, prompt_token_ids: Sequence[int], responses: Sequence[SampledResponse]) -> None:
        """Take a group whose responses are sampled; it is scored and put with those that come soon after it."""
        self._gathering.append(SampledGroup(ticket, prompt_token_ids, responses))
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
            judged = [(response, next(outcomes)) for response in group.responses]
            errors = [outcome for _, outcome in judged if isinstance(outcome, RewardError)]
            if errors:
                await self._queue.void(group.ticket, str(errors[0]))
                continue
            trajectories = [self._trajectory(group, r, outcome) for r, outcome in judged if isinstance(outcome, Score)]
            finished.append((group.ticket, trajectories))
        if finished:
            await self._queue.put(finished)

    def _requests(self, wave: Sequence[SampledGroup]) -> list[ScoreRequest]:
        answered = [(group.ticket.row, response) for group in wave for response in group.responses]
        texts = self._tokenizer.decode([response.token_ids for _, response in answered])
        return [
            ScoreRequest(response.uid, row["prompt"], text, scorer_columns(row))
            for (row, response), text in zip(answered, texts, strict=True)
        ]

    def _trajectory(self, group: SampledGroup, response: SampledResponse, score: Score) -> Trajectory:
        """The record of one response: P prompt tokens, masked out, then N sampled ones."""
        num_prompt, num_sampled = len(group.prompt_token_ids), len(response.token_ids)
        return Trajectory(
            uid=response.uid,
            group=group.ticket.group,
            task=self._task,
            token_ids=[*group.prompt_token_ids, *response.token_ids],
            mask=[False] * num_prompt + [True] * num_sampled,
            behavior_logprobs=[0.0] * num_prompt + response.logprobs,
            segments=shifted(response.segments, num_prompt),
            turns=[Turn(num_prompt, num_sampled)],
            admission_index=group.ticket.admission_index,
            finish_reason=response.finish_reason,
            reward=score.reward,
            reward_parts=dict(score.parts),
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
