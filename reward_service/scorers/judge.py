"""The kind `judge`: a model at an OpenAI-compatible endpoint scores a response by a rubric.

At temperature 0 the same question usually gets the same answer, but no endpoint guarantees it. The version digests
the rubric and the model's name, not the model's weights.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import re
from collections.abc import Sequence
from typing import Any

import httpx
import regex
import tenacity

from cluster.errors import InputError, RewardError, RewardUnavailable
from cluster.scoring import Outcome, Score, ScoreRequest
from reward_service.config.scorers import JudgeConfig, settings_text
from reward_service.parsing.fenced import last_block
from reward_service.parsing.numbers import number_of
from reward_service.parsing.opinions import score_in
from reward_service.retries import retry_after_s
from reward_service.scorers.rule_scorer import last_match, references_of
from reward_service.scorers.scorer import Builder, Kind, Scorer, digest_of, register_kind, setting_key

PLACEHOLDER = re.compile(r"\{(prompt|response|reference)\}")
FIRST_WAIT_S = 0.25
LONGEST_WAIT_S = 8.0
QUOTED_CHARACTERS = 200


class Busy(Exception):
    """The endpoint is busy or failed; `after_s` is the delay it asks for, if any."""

    def __init__(self, what: str, after_s: float | None = None) -> None:
        super().__init__(what)
        self.after_s = after_s


class JudgeScorer:
    """Asks one question per item, at most `max_concurrent` at a time.

    Raises InputError if the key is not set.

    An answer without a number is a RewardError that names the item; no answer within the item's deadline is a
    RewardUnavailable.
    """

    def __init__(self, name: str, config: JudgeConfig) -> None:
        self.name = name
        self.version = f"{name}@{digest_of(settings_text(config))}"
        self._config = config
        self._pattern = regex.compile(config.pattern) if config.pattern else None
        self._headers = {"Authorization": f"Bearer {api_key(config, name)}"} if config.api_key_variable else {}
        self._free = asyncio.Semaphore(config.max_concurrent)
        self._client: httpx.AsyncClient | None = None

    async def score(self, requests: Sequence[ScoreRequest]) -> list[Outcome]:
        """Return one outcome per request, in order."""
        return list(await asyncio.gather(*(self._outcome(request) for request in requests)))

    async def aclose(self) -> None:
        """Close the connections."""
        client, self._client = self._client, None
        if client is not None:
            await client.aclose()

    async def _outcome(self, request: ScoreRequest) -> Outcome:
        try:
            messages = self._messages(request)
            async with self._free:
                opinion = await self._opinion(messages)
            number = self._number(opinion, request.id)
        except UnicodeEncodeError as error:
            return RewardError(self.name, f"{request.id} is not valid Unicode: {error.reason}")
        except RewardError as error:
            return type(error)(self.name, f"{error.what} (scoring {request.id})")
        low, high = self._config.low, self._config.high
        reward = number if low is None or high is None else (number - low) / (high - low)
        return Score(request.id, reward, {"opinion": number, self.name: reward}, self.version)

    def _messages(self, request: ScoreRequest) -> list[dict[str, str]]:
        """Return the rubric with the item's texts filled in; placeholders inside a text are left alone."""
        rubric = self._config.rubric
        values = {"prompt": request.prompt, "response": request.response}
        if "{reference}" in rubric:
            values["reference"] = "\n".join(map(str, references_of(request)))
        filled = PLACEHOLDER.sub(lambda match: values[match[1]], rubric)
        system = [{"role": "system", "content": self._config.system}] if self._config.system is not None else []
        return [*system, {"role": "user", "content": filled}]

    async def _opinion(self, messages: list[dict[str, str]]) -> str:
        """Return the model's answer.

        Raises RewardError if it is refused, RewardUnavailable if none comes in time.
        """
        config = self._config
        body = {
            "model": config.model,
            "messages": messages,
            "temperature": config.temperature,
            "max_tokens": config.max_tokens,
        }
        retrying = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type((Busy, httpx.TransportError)),
            wait=_wait,
            stop=tenacity.stop_after_attempt(config.max_attempts) | _stop_if_too_late(config.timeout_s),
            reraise=True,
        )
        try:
            async with asyncio.timeout(config.timeout_s):
                return await retrying(self._ask, body)
        except TimeoutError:
            what = f"{config.url} did not answer within {config.timeout_s:g} s"
            raise RewardUnavailable("judge", what) from None
        except (Busy, httpx.RequestError) as error:
            raise RewardUnavailable("judge", f"{config.url}: {type(error).__name__}: {error}") from error

    async def _ask(self, body: dict[str, Any]) -> str:
        if self._client is None:
            self._client = httpx.AsyncClient(headers=self._headers, timeout=self._config.timeout_s, trust_env=False)
        url = self._config.url.rstrip("/") + "/chat/completions"
        answer = await self._client.post(url, json=body)
        if answer.status_code == 429 or answer.status_code >= 500:
            raise Busy(f"answered {answer.status_code}: {_quoted(answer.text)}", retry_after_s(answer.headers))
        if answer.status_code != 200:
            raise RewardError("judge", f"{url} answered {answer.status_code}: {_quoted(answer.text)}")
        try:
            content = answer.json()["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError, RecursionError):
            raise RewardError("judge", f"{url} answered no chat completion: {_quoted(answer.text)}") from None
        if not isinstance(content, str):
            raise RewardError("judge", f"{url} answered without text: {_quoted(answer.text)}")
        return content

    def _number(self, opinion: str, item: str) -> float:
        """Return the number in an answer. Raises RewardError if there is none or it is out of bounds."""
        number = self._found(opinion, item)
        if number is None:
            raise RewardError("judge", f"no number in its answer: {_quoted(opinion)}")
        low, high = self._config.low, self._config.high
        if low is not None and high is not None and not low <= number <= high:
            raise RewardError("judge", f"{number:g} is not within {low:g} to {high:g}: {_quoted(opinion)}")
        return number

    def _found(self, opinion: str, item: str) -> float | None:
        if self._config.json_field is None:
            if self._pattern is None:
                return score_in(opinion)
            return number_of(last_match(self._pattern, opinion, item))
        try:
            values = json.loads(last_block(opinion))
        except (ValueError, RecursionError):
            return None
        return number_of(values.get(self._config.json_field)) if isinstance(values, dict) else None


def api_key(config: JudgeConfig, name: str) -> str:
    """Return the endpoint's key. Raises InputError if its environment variable is not set."""
    variable = config.api_key_variable or ""
    key = os.environ.get(variable)
    if not key:
        raise InputError(setting_key(name, "api_key_variable"), f"{variable} is not set in the environment")
    return key


def _quoted(text: str) -> str:
    return repr(text[:QUOTED_CHARACTERS]) + ("..." if len(text) > QUOTED_CHARACTERS else "")


_backoff = tenacity.wait_random_exponential(multiplier=FIRST_WAIT_S, max=LONGEST_WAIT_S)


def _wait(state: tenacity.RetryCallState) -> float:
    """Return the delay that the endpoint asked for, else an exponential backoff with jitter."""
    error = state.outcome.exception() if state.outcome else None
    after_s = error.after_s if isinstance(error, Busy) else None
    return _backoff(state) if after_s is None else after_s


def _stop_if_too_late(timeout_s: float) -> Any:
    """Stop if the next attempt would be past the deadline."""

    def stop(state: tenacity.RetryCallState) -> bool:
        elapsed = state.seconds_since_start or 0.0
        return math.isfinite(timeout_s) and elapsed + state.upcoming_sleep >= timeout_s

    return stop


def _build(name: str, config: JudgeConfig, builder: Builder) -> Scorer:
    return JudgeScorer(name, config)


def _check_environment(name: str, config: JudgeConfig) -> None:
    if config.api_key_variable is not None:
        api_key(config, name)


register_kind(JudgeConfig, Kind(_build, check_environment=_check_environment))
