"""Clients of the reward service, by Serve handle inside the cluster and by HTTP outside, with one contract.

`score` gives exactly one finite reward a request, in their order, within `timeout_s`, or raises RewardError saying
who failed. Knows nothing of scorers. A client is plain data until its first call, so it travels between processes.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Sequence
from typing import Any

import httpx
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import DeploymentUnavailableError, RayServeException

from cluster.errors import ActorDied, DeadlineExceeded, RewardError
from cluster.remote import call_handle, within
from cluster.scoring import Score, ScoreRequest
from reward_service.config import app_name

WHERE = "reward_service"
PATIENCE_S = 2.0


class HandleRewardClient:
    """Calls the reward service of a run, given by the run's name or the service's handle, on the Ray of this process.

    Raises RewardError also when the application is deleted or its replica dies while a call waits.
    """

    def __init__(self, run: str | Any, timeout_s: float) -> None:
        self.app_name: str = app_name(run) if isinstance(run, str) else run.app_name
        self._timeout_s = timeout_s
        self._handle: Any = None
        self._seen_at = -math.inf

    def __reduce__(self) -> tuple[Any, ...]:
        return (_client_of, (self.app_name, self._timeout_s))

    async def score(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        """One score a request, in their order. Raises RewardError naming the scorer or the service."""
        waited_for = f"application {self.app_name} to score {len(requests)} responses"
        try:
            scores = await within(self._score(requests), self._timeout_s, where=WHERE, waited_for=waited_for)
        except DeadlineExceeded as error:
            raise RewardError(WHERE, error.what) from error
        return check_scores(requests, scores)

    async def _score(self, requests: Sequence[ScoreRequest]) -> Any:
        """Await the answer, looking now and then whether anyone is left to give it."""
        answer = asyncio.ensure_future(self._call(list(requests)))
        try:
            while not (await asyncio.wait([answer], timeout=PATIENCE_S))[0]:
                await self._look_up(max_age_s=PATIENCE_S)
            return await answer
        finally:
            answer.cancel()

    async def _call(self, requests: list[ScoreRequest]) -> Any:
        if self._handle is None:
            await self._look_up(max_age_s=0.0)
        try:
            return await call_handle(self._handle, "score", requests, name=self.app_name)
        except ActorDied as error:
            raise RewardError(WHERE, f"a replica of {self.app_name} died while it scored: {error.what}") from error
        except DeploymentUnavailableError as error:
            raise RewardError(WHERE, f"application {self.app_name} is gone: {error.message}") from error
        except (RayServeException, RayError) as error:
            raise RewardError(WHERE, f"application {self.app_name}: {type(error).__name__}: {error}") from error

    async def _look_up(self, *, max_age_s: float) -> None:
        """Ask Serve for the application unless it was there `max_age_s` ago. Raises RewardError when it is gone."""
        if time.monotonic() - self._seen_at < max_age_s:
            return
        self._seen_at = time.monotonic()
        try:
            handle = await asyncio.to_thread(serve.get_app_handle, self.app_name)
        except (RayServeException, RayError) as error:
            self._seen_at = -math.inf
            raise RewardError(WHERE, f"application {self.app_name} is gone: {error}") from error
        if self._handle is None:
            self._handle = handle


def _client_of(app: str, timeout_s: float) -> HandleRewardClient:
    client = HandleRewardClient("", timeout_s)
    client.app_name = app
    return client


class HttpRewardClient:
    """Calls `POST /v1/rewards` at `url` with one pooled connection set.

    Only the column `references` travels: the HTTP contract has no other.
    """

    def __init__(self, url: str, token: str | None, timeout_s: float) -> None:
        self._url = url.rstrip("/") + "/v1/rewards"
        self._token = token
        self._timeout_s = timeout_s
        self._client: httpx.AsyncClient | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return (HttpRewardClient, (self._url.removesuffix("/v1/rewards"), self._token, self._timeout_s))

    async def score(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        """One score a request, in their order. Raises RewardError naming the scorer or the service."""
        try:
            body = await asyncio.wait_for(self._post(requests), self._timeout_s)
        except (TimeoutError, httpx.TimeoutException) as error:
            raise RewardError(WHERE, f"waited {self._timeout_s:g} s for {self._url}") from error
        except (httpx.HTTPError, ValueError) as error:
            raise RewardError(WHERE, f"{self._url}: {type(error).__name__}: {error}") from error
        try:
            scores = [_to_score(item, body["model_version"]) for item in body["rewards"]]
        except (KeyError, TypeError, AttributeError) as error:
            raise RewardError(WHERE, f"{self._url} answered what is no list of rewards: {error!r}") from error
        return check_scores(requests, scores)

    async def aclose(self) -> None:
        """Close the connections."""
        if self._client is not None:
            await self._client.aclose()
            self._client = None

    async def _post(self, requests: Sequence[ScoreRequest]) -> Any:
        if self._client is None:
            headers = {"Authorization": f"Bearer {self._token}"} if self._token else {}
            self._client = httpx.AsyncClient(headers=headers, timeout=self._timeout_s, trust_env=False)
        response = await self._client.post(self._url, json=_to_json(requests))
        if response.status_code != 200:
            raise RewardError(WHERE, f"{self._url} answered {response.status_code}: {response.text[:500]}")
        return response.json()


def check_scores(requests: Sequence[ScoreRequest], scores: Any) -> list[Score]:
    """The scores, or RewardError where they are not one finite score a request under its own id."""
    if not isinstance(scores, list) or not all(isinstance(score, Score) for score in scores):
        raise RewardError(WHERE, f"answered {type(scores).__name__}, not a list of scores")
    if len(scores) != len(requests):
        raise RewardError(WHERE, f"answered {len(scores)} scores for {len(requests)} responses")
    for request, score in zip(requests, scores, strict=True):
        if score.id != request.id:
            raise RewardError(WHERE, f"answered a score for {score.id} where {request.id} was asked")
        if isinstance(score.reward, bool) or not isinstance(score.reward, int | float):
            raise RewardError(WHERE, f"answered {score.reward!r} for {score.id}, not a number")
        if not math.isfinite(score.reward):
            raise RewardError(WHERE, f"answered {score.reward} for {score.id}, not a finite number")
    return scores


def _to_json(requests: Sequence[ScoreRequest]) -> dict[str, Any]:
    body: dict[str, Any] = {
        "ids": [request.id for request in requests],
        "prompts": [request.prompt for request in requests],
        "responses": [request.response for request in requests],
    }
    if any("references" in request.columns for request in requests):
        body["references"] = [request.columns.get("references") for request in requests]
    return body


def _to_score(item: Any, version: str) -> Score:
    if item.get("error") is not None or item.get("reward") is None:
        raise RewardError(WHERE, f"no reward for {item['id']}: {item.get('error')}")
    return Score(item["id"], item["reward"], item.get("parts", {}), version)
