"""Clients of the reward service, by Serve handle inside the cluster and by HTTP outside, with one contract.

`outcomes` gives exactly one finite reward a request, in their order, or in its place the RewardError that says why
there is none; `score` raises the first of those. Both raise RewardUnavailable where the service is down, busy, silent
or answers nonsense, so that the same may be asked again. `Patient` asks again for as long as a run is willing to wait.
Knows nothing of scorers. A client is plain data until its first call, so it travels between processes.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import httpx

from cluster.errors import DeadlineExceeded, RewardError, RewardUnavailable
from cluster.scoring import Outcome, Score, ScoreRequest
from reward_service.config import NO_SCORER, REWARD_MODEL, RewardServiceConfig, app_name
from reward_service.handle import ServiceHandle

WHERE = "reward_service"
PAUSE_S, LONGEST_PAUSE_S = 0.2, 5.0


class Client(Protocol):
    """Scores, or raises as the module says."""

    async def outcomes(self, requests: Sequence[ScoreRequest]) -> list[Outcome]:
        """One outcome a request, in their order."""

    async def aclose(self) -> None:
        """Close its connections; it may be used again."""


def run_client(
    config: RewardServiceConfig, run_name: str, token: str | None, scorers: Mapping[str, str] | None = None
) -> Patient:
    """The client that a run uses: of its own service, or of the one elsewhere that `url` names.

    There the run's scorer is asked for by name, and the service's own default where the run names none. `scorers` are
    those of a run's tasks, by the tasks' names, where it has several.
    """
    if scorers:
        by_task = {task: _client(config, run_name, token, scorer) for task, scorer in scorers.items()}
        return Patient(TaskClients(by_task), config.patience_s)
    return Patient(_client(config, run_name, token, config.scorer), config.patience_s)


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


class TaskClients:
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


class Patient:
    """Asks a client again while its service is unavailable, for at most `patience_s` since its last answer to anybody.

    Nothing else is waited for meanwhile, so a run pauses; `waiting` says for what. Pauses between tries grow and are
    jittered, and are as long as the service asks for, where that leaves one more try.
    """

    def __init__(self, client: Client, patience_s: float) -> None:
        self._client = client
        self._patience_s = patience_s
        self._missing: dict[int, str] = {}
        self._calls = 0
        self._answered_at = -math.inf

    def __reduce__(self) -> tuple[Any, ...]:
        return (Patient, (self._client, self._patience_s))

    async def score(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        """One score a request, in their order. Raises what `outcomes` raises, and the first error among them."""
        return all_scores(await self.outcomes(requests))

    async def outcomes(self, requests: Sequence[ScoreRequest]) -> list[Outcome]:
        """One outcome a request, in their order; none of them is RewardUnavailable: that is waited for.

        Raises the last RewardUnavailable when patience is spent.
        """
        self._calls += 1
        call, started, pause_s = self._calls, time.monotonic(), PAUSE_S
        try:
            while True:
                try:
                    outcomes = _all_available(await self._client.outcomes(requests))
                    self._answered_at = time.monotonic()
                    return outcomes
                except RewardUnavailable as error:
                    left_s = max(started, self._answered_at) + self._patience_s - time.monotonic()
                    wait_s = min(max(pause_s * random.uniform(0.5, 1.0), error.retry_after_s or 0.0), left_s)
                    if left_s <= 0:
                        raise self._spent(requests, error) from error
                    self._missing[call] = f"{len(requests)} rewards ({_named(requests)}): {error.what}"
                await asyncio.sleep(wait_s)
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
        finally:
            self._missing.pop(call, None)

    async def aclose(self) -> None:
        """Close the client's connections."""
        await self._client.aclose()

    def waiting(self) -> str | None:
        """What is missing, where something has been missing since the last try; None when all is well."""
        return next(iter(self._missing.values()), None)

    def _spent(self, requests: Sequence[ScoreRequest], error: RewardUnavailable) -> RewardUnavailable:
        what = f"no rewards for {_named(requests)} in {self._patience_s:g} s (reward_service.patience_s): {error.what}"
        return RewardUnavailable(WHERE, what)


class HandleRewardClient:
    """Calls the reward service of a run, given by the run's name, on the Ray of this process.

    `scorer` is the one that is asked there; without it the service's default.
    """

    def __init__(self, run_name: str, timeout_s: float, scorer: str | None = None) -> None:
        self._run_name = run_name
        self._timeout_s = timeout_s
        self._scorer = scorer
        self._service = ServiceHandle(app_name(run_name))

    def __reduce__(self) -> tuple[Any, ...]:
        return (HandleRewardClient, (self._run_name, self._timeout_s, self._scorer))

    async def score(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        """One score a request, in their order. Raises RewardError naming the scorer or the service."""
        return all_scores(await self.outcomes(requests))

    async def outcomes(self, requests: Sequence[ScoreRequest]) -> list[Outcome]:
        """One outcome a request, in their order: its score, or the RewardError that its scorer gave in its place."""
        waited_for = f"to score {len(requests)} responses"
        try:
            outcomes = await self._service.call(
                "outcomes", list(requests), self._scorer, timeout_s=self._timeout_s, waited_for=waited_for
            )
        except DeadlineExceeded as error:
            raise RewardUnavailable(WHERE, error.what) from error
        return check_outcomes(requests, outcomes)

    async def aclose(self) -> None:
        """Nothing: a handle has no connection of its own."""


class HttpRewardClient:
    """Calls `POST /v1/rewards` at `url` with one pooled connection set; every item goes under its own id.

    What is refused for a moment (429, 5xx) or not answered is tried again a few times, with jitter.
    """

    def __init__(
        self, url: str, token: str | None, timeout_s: float, *, scorer: str | None = None, num_tries: int = 3
    ) -> None:
        self._num_tries = num_tries
        self._url = url.rstrip("/")
        self._token = token
        self._timeout_s = timeout_s
        self._scorer = scorer
        self._client: httpx.AsyncClient | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return (_http_client, (self._url, self._token, self._timeout_s, self._scorer, self._num_tries))

    async def score(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        """One score a request, in their order. Raises RewardError naming the scorer or the service."""
        return all_scores(await self.outcomes(requests))

    async def outcomes(self, requests: Sequence[ScoreRequest]) -> list[Outcome]:
        """One outcome a request, in their order: its score, or the RewardError that the service gave in its place."""
        for left in reversed(range(self._num_tries)):
            try:
                response = await self._post(requests)
                break
            except RewardUnavailable as error:
                if not left or (error.retry_after_s or 0.0) > LONGEST_PAUSE_S:
                    raise
                await asyncio.sleep(max(PAUSE_S * random.uniform(0.5, 1.0), error.retry_after_s or 0.0))
        return check_outcomes(requests, self._outcomes(requests, response))

    async def aclose(self) -> None:
        """Close the connections."""
        if self._client is not None:
            await self._client.aclose()
            self._client = None

    async def _post(self, requests: Sequence[ScoreRequest]) -> httpx.Response:
        """A 200. Raises RewardUnavailable for what may pass, RewardError for a request that is refused."""
        if self._client is None:
            headers = {"Authorization": f"Bearer {self._token}"} if self._token else {}
            self._client = httpx.AsyncClient(headers=headers, timeout=self._timeout_s, trust_env=False)
        url = f"{self._url}/v1/rewards"
        body = self._body(requests)
        try:
            response = await asyncio.wait_for(self._client.post(url, json=body), self._timeout_s)
        except (TimeoutError, httpx.TimeoutException) as error:
            raise RewardUnavailable(WHERE, f"waited {self._timeout_s:g} s for {url}") from error
        except httpx.RequestError as error:
            raise RewardUnavailable(WHERE, f"{url}: {type(error).__name__}: {error}") from error
        if response.status_code == 200:
            return response
        what = f"{url} answered {response.status_code}: {response.text[:500]}"
        if response.status_code == 429 or response.status_code >= 500:
            raise RewardUnavailable(WHERE, what, _retry_after_s(response))
        raise RewardError(WHERE, what)

    def _body(self, requests: Sequence[ScoreRequest]) -> dict[str, Any]:
        body: dict[str, Any] = {
            "timeout_s": self._timeout_s,
            "ids": [request.id for request in requests],
            "prompts": [request.prompt for request in requests],
            "responses": [request.response for request in requests],
        }
        names = sorted({name for request in requests for name in request.columns})
        if names:
            columns = {name: [request.columns.get(name) for request in requests] for name in names}
            body["columns"] = {name: _as_json(name, values) for name, values in columns.items()}
        return body | ({"scorer": self._scorer} if self._scorer else {})

    def _outcomes(self, requests: Sequence[ScoreRequest], response: httpx.Response) -> list[Outcome]:
        try:
            body = response.json()
            version, items = body["model_version"], list(body["rewards"])
            if not isinstance(version, str):
                raise TypeError(f"model_version is {version!r}")
            return [_outcome(item, request.id, version) for item, request in zip(items, requests, strict=True)]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            what = f"{self._url} answered what is no list of {len(requests)} rewards: {error!r}"
            raise RewardUnavailable(WHERE, what) from error


def all_scores(outcomes: Sequence[Outcome]) -> list[Score]:
    """The outcomes, all of them scores. Raises the first error among them."""
    scores = []
    for outcome in outcomes:
        if isinstance(outcome, RewardError):
            raise outcome
        scores.append(outcome)
    return scores


def _all_available(outcomes: list[Outcome]) -> list[Outcome]:
    """The outcomes. Raises the first that may be another one later."""
    for outcome in outcomes:
        if isinstance(outcome, RewardUnavailable):
            raise outcome
    return outcomes


def check_outcomes(requests: Sequence[ScoreRequest], scores: Any) -> list[Outcome]:
    """The outcomes, or RewardUnavailable where they are not one finite score, or error, a request under its own id."""
    if not isinstance(scores, list) or not all(isinstance(score, Score | RewardError) for score in scores):
        raise RewardUnavailable(WHERE, f"answered {type(scores).__name__}, not a list of scores")
    if len(scores) != len(requests):
        raise RewardUnavailable(WHERE, f"answered {len(scores)} scores for {len(requests)} responses")
    for request, score in zip(requests, scores, strict=True):
        if isinstance(score, RewardError):
            continue
        if score.id != request.id:
            raise RewardUnavailable(WHERE, f"answered a score for {score.id} where {request.id} was asked")
        if isinstance(score.reward, bool) or not isinstance(score.reward, int | float):
            raise RewardUnavailable(WHERE, f"answered {score.reward!r} for {score.id}, not a number")
        if not _is_finite(score.reward):
            raise RewardUnavailable(WHERE, f"answered {score.reward} for {score.id}, not a finite number")
        if not isinstance(score.parts, dict) or not all(map(_is_finite, score.parts.values())):
            raise RewardUnavailable(WHERE, f"answered parts for {score.id} that are not finite numbers by name")
    return scores


def _is_finite(value: Any) -> bool:
    """Whether it is a number that a double holds."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _outcome(item: Any, id: str, version: str) -> Outcome:
    if item["id"] != id:
        raise ValueError(f"an answer for {item['id']!r} where {id} was asked")
    if item.get("error") is None:
        return Score(id, item["reward"], item.get("parts", {}), version)
    kind = RewardUnavailable if item.get("unavailable") is True else RewardError
    return kind(WHERE, f"no reward for {id}: {item['error']}")


def _as_json(name: str, values: list[Any]) -> list[Any]:
    """The column, or RewardError naming it where it holds what JSON can't."""
    try:
        json.dumps(values, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise RewardError(WHERE, f"the column {name} can't travel over HTTP: {error}") from error
    return values


def _http_client(url: str, token: str | None, timeout_s: float, scorer: str | None, num_tries: int) -> HttpRewardClient:
    return HttpRewardClient(url, token, timeout_s, scorer=scorer, num_tries=num_tries)


def _retry_after_s(response: httpx.Response) -> float | None:
    """Seconds that the service asked for; None where it gave a date or nothing."""
    given = response.headers.get("Retry-After", "")
    return float(given) if given.isascii() and given.isdigit() else None


def _named(requests: Sequence[ScoreRequest]) -> str:
    ids = [request.id for request in requests]
    return ids[0] if len(ids) == 1 else f"{ids[0]} to {ids[-1]}"
