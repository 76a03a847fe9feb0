"""Clients of the reward service, by Serve handle inside the cluster and by HTTP outside, with one contract.

`outcomes` gives exactly one finite reward a request, in their order, or in its place the RewardError that says why
there is none; `score` raises the first of those. Both raise RewardUnavailable where the service is down, busy, silent
or answers nonsense, so that the same may be asked again.
`RetryingRewardClient` retries for as long as a run is willing to
wait. A client is plain data until its first call, so it travels between processes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

from cluster.errors import RewardError
from cluster.scoring import Outcome, Score, ScoreRequest
from reward_service.client.handle import WHERE, HandleRewardClient
from reward_service.client.http import HttpRewardClient
from reward_service.client.outcomes import Client
from reward_service.client.retrying import RetryingRewardClient
from reward_service.config.service import NO_SCORER, REWARD_MODEL, RewardServiceConfig


def run_client(
    config: RewardServiceConfig, run_name: str, token: str | None, scorers: Mapping[str, str] | None = None
) -> RetryingRewardClient:
    """The client that a run uses: of its own service, or of the one elsewhere that `url` names.

    There the run's scorer is asked for by name, and the service's own default where the run names none. `scorers` are
    those of a run's tasks, by the tasks' names, where it has several.
    """
    if scorers:
        by_task = {task: _client(config, run_name, token, scorer) for task, scorer in scorers.items()}
        return RetryingRewardClient(PerTaskClient(by_task), config.patience_s)
    return RetryingRewardClient(_client(config, run_name, token, config.scorer), config.patience_s)


def _client(config: RewardServiceConfig, run_name: str, token: str | None, scorer: str) -> Client:
    if scorer == NO_SCORER:
        return NoClient()
    if config.url is None:
        return HandleRewardClient(run_name, config.timeout_s, scorer=None if scorer == config.scorer else scorer)
    named = None if scorer == REWARD_MODEL else scorer
    return HttpRewardClient(config.url, token, config.timeout_s, scorer=named, num_tries=1)


class NoClient:
    """Where nothing is to be scored: the environment gives the rewards, and nothing is added to them."""

    async def outcomes(self, requests: Sequence[ScoreRequest]) -> list[Outcome]:
        """A score of 0 for each."""
        return [Score(request.id, 0.0, {}, NO_SCORER) for request in requests]

    async def aclose(self) -> None:
        """There is nothing to close."""


class PerTaskClient:
    """A client for each task, by its name; one of them is asked for each request."""

    def __init__(self, clients: Mapping[str, Client]) -> None:
        self._clients = clients

    async def outcomes(self, requests: Sequence[ScoreRequest]) -> list[Outcome]:
        """One outcome a request, in their order; no requests are put to every client.

        Raises what a client raises, and RewardError for a task that has none.
        """
        for request in requests:
            if request.task not in self._clients:
                raise RewardError(WHERE, f"{request.id} is of task {request.task!r}, which has no scorer")
        tasks = dict.fromkeys(request.task for request in requests) or self._clients
        asked = {task: [request for request in requests if request.task == task] for task in tasks}
        answers = await asyncio.gather(*(self._clients[task].outcomes(own) for task, own in asked.items()))
        left = {task: iter(outcomes) for task, outcomes in zip(asked, answers, strict=True)}
        return [next(left[request.task]) for request in requests]

    async def aclose(self) -> None:
        """Close all of them."""
        for client in self._clients.values():
            await client.aclose()
