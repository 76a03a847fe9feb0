"""Makes the reward client of a run: by Serve handle, or by HTTP to an external service."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

from cluster.errors import RewardError
from cluster.scoring import Outcome, Score, ScoreRequest
from reward_service.client.handle import HandleRewardClient
from reward_service.client.http import HttpRewardClient
from reward_service.client.outcomes import WHERE, RewardTransport
from reward_service.client.retrying import RetryingRewardClient
from reward_service.config.service import NO_SCORER, REWARD_MODEL, RewardServiceConfig


def run_client(
    config: RewardServiceConfig, run_name: str, token: str | None, scorers: Mapping[str, str] | None = None
) -> RetryingRewardClient:
    """Return the client of the run's own service, or of the external one at `url`.

    An external service gets the name of the run's scorer, or uses its default if that is `reward_model`. `scorers`
    maps the run's tasks to their scorers, if it has several tasks.
    """
    if scorers:
        by_task = {task: _transport(config, run_name, token, scorer) for task, scorer in scorers.items()}
        return RetryingRewardClient(PerTaskClient(by_task), config.patience_s)
    return RetryingRewardClient(_transport(config, run_name, token, config.scorer), config.patience_s)


def _transport(config: RewardServiceConfig, run_name: str, token: str | None, scorer: str) -> RewardTransport:
    if scorer == NO_SCORER:
        return NoClient()
    if config.url is None:
        return HandleRewardClient(run_name, config.timeout_s, scorer=None if scorer == config.scorer else scorer)
    name = None if scorer == REWARD_MODEL else scorer
    return HttpRewardClient(config.url, token, config.timeout_s, scorer=name, num_tries=1)


class NoClient:
    """Returns rewards of 0, for a run whose environment gives all rewards."""

    async def outcomes(self, requests: Sequence[ScoreRequest]) -> list[Outcome]:
        """Return a score of 0 for each request."""
        return [Score(request.id, 0.0, {}, NO_SCORER) for request in requests]

    async def aclose(self) -> None:
        """Do nothing: there are no connections."""


class PerTaskClient:
    """Sends each request to the client of its task."""

    def __init__(self, clients: Mapping[str, RewardTransport]) -> None:
        self._clients = clients

    async def outcomes(self, requests: Sequence[ScoreRequest]) -> list[Outcome]:
        """Return one outcome per request, in order. Without requests, calls every client with none.

        Raises what a client raises, and RewardError for a task without a client.
        """
        for request in requests:
            if request.task not in self._clients:
                raise RewardError(WHERE, f"{request.id} is of task {request.task!r}, which has no scorer")
        tasks = dict.fromkeys(request.task for request in requests) or self._clients
        by_task = {task: [request for request in requests if request.task == task] for task in tasks}
        answers = await asyncio.gather(*(self._clients[task].outcomes(own) for task, own in by_task.items()))
        remaining = {task: iter(outcomes) for task, outcomes in zip(by_task, answers, strict=True)}
        return [next(remaining[request.task]) for request in requests]

    async def aclose(self) -> None:
        """Close every client."""
        for client in self._clients.values():
            await client.aclose()
