"""Asks a language model behind an OpenAI-compatible endpoint what a response is worth.

The same question at temperature 0 mostly has the same answer, which no endpoint promises; the version digests the
rubric and the model's name, not its weights. Knows nothing of what serves the model.
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
from reward_service.scorers.checked_rules import last_block
from reward_service.scorers.rules import last_match, number_of, references_of
from reward_service.scorers.scorer import digest_of

PLACEHOLDER = re.compile(r"\{(prompt|response|reference)\}")
FIRST_WAIT_S = 0.25
LONGEST_WAIT_S = 8.0
SHOWN_CHARACTERS = 200


class Busy(Exception):
    """The endpoint can't answer now; it may say after how many seconds it can."""

    def __init__(self, what: str, after_s: float | None = None) -> None:
        super().__init__(what)
        self.after_s = after_s


class JudgeScorer:
    """Asks one question an item, a bounded number at a time. Raises InputError where the key's variable is not set.

    An opinion without a number is an error naming the item; one that can't be had within the item's deadline may be had
    later (RewardUnavailable).
    """

    def __init__(self, name: str, config: JudgeConfig) -> None:
        self.name = name
        self.version = f"{name}@{digest_of(settings_text(config))}"
        self._config = config
        self._pattern = regex.compile(config.pattern)
        self._headers = {"Authorization": f"Bearer {api_key(config, name)}"} if config.api_key_variable else {}
        self._free = asyncio.Semaphore(config.max_concurrent)
        self._client: httpx.AsyncClient | None = None

    async def score(self, requests: Sequence[ScoreRequest]) -> list[Outcome]:
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
        """The rubric with the item's texts in their places; what stands in a text is never taken for a place."""
        rubric = self._config.rubric
        values = {"prompt": request.prompt, "response": request.response}
        if "{reference}" in rubric:
            values["reference"] = "\n".join(map(str, references_of(request)))
        filled = PLACEHOLDER.sub(lambda place: values[place[1]], rubric)
        system = [{"role": "system", "content": self._config.system}] if self._config.system is not None else []
        return [*system, {"role": "user", "content": filled}]

    async def _opinion(self, messages: list[dict[str, str]]) -> str:
        """What the model says. Raises RewardError where it is refused, RewardUnavailable where nobody answers."""
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
            stop=tenacity.stop_after_attempt(config.max_attempts) | _stop_where_too_late(config.timeout_s),
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
            raise Busy(f"answered {answer.status_code}: {_shown(answer.text)}", _retry_after_s(answer))
        if answer.status_code != 200:
            raise RewardError("judge", f"{url} answered {answer.status_code}: {_shown(answer.text)}")
        try:
            content = answer.json()["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError, RecursionError):
            raise RewardError("judge", f"{url} answered no chat completion: {_shown(answer.text)}") from None
        if not isinstance(content, str):
            raise RewardError("judge", f"{url} answered without text: {_shown(answer.text)}")
        return content

    def _number(self, opinion: str, item: str) -> float:
        """The number in an opinion. Raises RewardError quoting one that has none, or one out of bounds."""
        number = number_of(self._found(opinion, item))
        if number is None:
            raise RewardError("judge", f"no number in its opinion: {_shown(opinion)}")
        low, high = self._config.low, self._config.high
        if low is not None and high is not None and not low <= number <= high:
            raise RewardError("judge", f"{number:g} is not within {low:g} to {high:g}: {_shown(opinion)}")
        return number

    def _found(self, opinion: str, item: str) -> Any:
        if self._config.json_field is None:
            return last_match(self._pattern, opinion, item)
        try:
            values = json.loads(last_block(opinion))
        except (ValueError, RecursionError):
            return None
        return values.get(self._config.json_field) if isinstance(values, dict) else None


def api_key(config: JudgeConfig, name: str) -> str:
    """The endpoint's key. Raises InputError where its variable is not set."""
    variable = config.api_key_variable or ""
    key = os.environ.get(variable)
    if not key:
        where = f"reward_service.scorers.{name}.api_key_variable"
        raise InputError(where, f"{variable} is not set in the environment")
    return key


def _shown(text: str) -> str:
    return repr(text[:SHOWN_CHARACTERS]) + ("..." if len(text) > SHOWN_CHARACTERS else "")


def _retry_after_s(answer: httpx.Response) -> float | None:
    """The seconds that the endpoint asks to wait; dates are not understood."""
    seconds = number_of(answer.headers.get("retry-after"))
    return seconds if seconds is not None and seconds >= 0 else None


_backed_off = tenacity.wait_random_exponential(multiplier=FIRST_WAIT_S, max=LONGEST_WAIT_S)


def _wait(state: tenacity.RetryCallState) -> float:
    """What the endpoint asked for, at least; else longer each time, with jitter."""
    error = state.outcome.exception() if state.outcome else None
    asked = error.after_s if isinstance(error, Busy) else None
    return _backed_off(state) if asked is None else asked


def _stop_where_too_late(timeout_s: float) -> Any:
    """Stop at once where the next attempt would be past the deadline."""

    def stop(state: tenacity.RetryCallState) -> bool:
        elapsed = state.seconds_since_start or 0.0
        return math.isfinite(timeout_s) and elapsed + state.upcoming_sleep >= timeout_s

    return stop
