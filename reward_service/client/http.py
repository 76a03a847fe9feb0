"""Reward client over HTTP."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Sequence
from typing import Any

import httpx

from cluster.data.control_tokens import RenderedPrompt
from cluster.errors import BatchFailed, RewardError, RewardUnavailable
from cluster.scoring import Outcome, Score, ScoreRequest
from reward_service.client.outcomes import LONGEST_PAUSE_S, PAUSE_S, WHERE, check_outcomes
from reward_service.retries import retry_after_s


class HttpRewardClient:
    """Calls `POST /v1/rewards` at `url` over pooled connections; every item keeps its id.

    Calls that time out, fail to connect or get 429 or 5xx are tried `num_tries` times, with jitter.
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

    async def outcomes(self, requests: Sequence[ScoreRequest]) -> list[Outcome]:
        """Return one outcome per request, in order: its score, or the RewardError of its scorer."""
        for left in reversed(range(self._num_tries)):
            try:
                response = await self._post(requests)
                break
            except RewardUnavailable as error:
                if not left or (error.retry_after_s or 0.0) > LONGEST_PAUSE_S:
                    raise
                await asyncio.sleep(max(PAUSE_S * random.uniform(0.5, 1.0), error.retry_after_s or 0.0))
        return check_outcomes(requests, self._parsed(requests, response))

    async def aclose(self) -> None:
        """Close the connections."""
        if self._client is not None:
            await self._client.aclose()
            self._client = None

    async def _post(self, requests: Sequence[ScoreRequest]) -> httpx.Response:
        """Return a 200.

        Raises RewardUnavailable if a retry may succeed, RewardError if the request is rejected.
        """
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
            raise RewardUnavailable(WHERE, what, retry_after_s(response.headers))
        raise RewardError(WHERE, what)

    def _body(self, requests: Sequence[ScoreRequest]) -> dict[str, Any]:
        body: dict[str, Any] = {
            "timeout_s": self._timeout_s,
            "ids": [request.id for request in requests],
            "prompts": [request.prompt for request in requests],
            "responses": [request.response for request in requests],
        }
        texts = {"prompt_literals": body["prompts"], "response_literals": body["responses"]}
        body |= {name: _literals(values) for name, values in texts.items() if _needs_literals(name, values)}
        names = sorted({name for request in requests for name in request.columns})
        if names:
            columns = {name: [request.columns.get(name) for request in requests] for name in names}
            body["columns"] = {name: _as_json(name, values) for name, values in columns.items()}
        return body | ({"scorer": self._scorer} if self._scorer else {})

    def _parsed(self, requests: Sequence[ScoreRequest], response: httpx.Response) -> list[Outcome]:
        try:
            body = response.json()
            version, items = body["model_version"], list(body["rewards"])
            if not isinstance(version, str):
                raise TypeError(f"model_version is {version!r}")
            return [_outcome(item, request.id, version) for item, request in zip(items, requests, strict=True)]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            what = f"{self._url} did not answer a list of {len(requests)} rewards: {error!r}"
            raise RewardUnavailable(WHERE, what) from error


def _outcome(item: Any, id: str, version: str) -> Outcome:
    if item["id"] != id:
        raise ValueError(f"an answer for {item['id']!r} instead of {id}")
    if item.get("error") is None:
        return Score(id, item["reward"], item.get("parts", {}), version)
    kinds: dict[str, type[RewardError]] = {"unavailable": RewardUnavailable, "batch_failed": BatchFailed}
    error = next((kind for field, kind in kinds.items() if item.get(field) is True), RewardError)
    return error(WHERE, f"no reward for {id}: {item['error']}")


def _literals(texts: Sequence[str]) -> list[list[tuple[int, int]] | None]:
    """Return the spans of each text that are text although they spell control tokens; None for a plain text."""
    return [list(text.literals) if isinstance(text, RenderedPrompt) else None for text in texts]


def _needs_literals(name: str, texts: Sequence[str]) -> bool:
    """Return whether texts differ from what the service takes them for if it is sent no spans."""
    if name == "response_literals":
        return any(isinstance(text, RenderedPrompt) for text in texts)
    return not all(isinstance(text, RenderedPrompt) and not text.literals for text in texts)


def _as_json(name: str, values: list[Any]) -> list[Any]:
    """Return the column. Raises RewardError that names it if it contains what JSON can't represent."""
    try:
        json.dumps(values, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise RewardError(WHERE, f"the column {name} can't be sent as JSON: {error}") from error
    return values


def _http_client(url: str, token: str | None, timeout_s: float, scorer: str | None, num_tries: int) -> HttpRewardClient:
    return HttpRewardClient(url, token, timeout_s, scorer=scorer, num_tries=num_tries)
