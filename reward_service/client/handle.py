"""Calls the reward service's application by its Serve handle. Knows nothing of what is asked.

Scoring changes nothing, so what a replica that died had under way is asked of another one.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Sequence
from typing import Any

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException

from cluster.actors.remote import call_handle, within
from cluster.errors import ActorDied, DeadlineExceeded, RewardError, RewardUnavailable
from cluster.scoring import Outcome, Score, ScoreRequest
from reward_service.backend import ScorerInfo
from reward_service.client.outcomes import all_scores, check_outcomes
from reward_service.config.service import app_name

WHERE = "reward_service"
LOOK_EVERY_S = 2.0
"""How often a call that waits looks whether the application is still there."""
PAUSE_S = 0.05
"""Before a call is made again whose replica died."""
MAX_DEATHS = 4
"""Replicas that may die with one call: a call that kills whoever has it must not kill all."""


class ServiceHandle:
    """A handle of one application on the Ray of this process; plain data until its first call, so it travels."""

    def __init__(self, app_name: str) -> None:
        self.app_name = app_name
        self._handle: Any = None
        self._seen_at = -math.inf

    def __reduce__(self) -> tuple[Any, ...]:
        return (ServiceHandle, (self.app_name,))

    async def call(self, method: str, *args: Any, timeout_s: float, waited_for: str) -> Any:
        """The method's answer, from whichever replica gives it.

        Raises what the method raises; RewardError where it killed one replica after the other; RewardUnavailable where
        the application is gone, broken or has too many calls waiting; DeadlineExceeded after `timeout_s`.
        """
        return await within(
            self._answer(method, args), timeout_s, where=WHERE, waited_for=f"application {self.app_name} {waited_for}"
        )

    async def _answer(self, method: str, args: tuple[Any, ...]) -> Any:
        for left in reversed(range(MAX_DEATHS)):
            try:
                return await self._watched(method, args)
            except ActorDied as error:
                if not left:
                    what = f"{MAX_DEATHS} replicas of {self.app_name} died one after the other with this call"
                    raise RewardError(WHERE, f"{what}: {error.what}") from error
            await asyncio.sleep(PAUSE_S)
            await self._look_up(max_age_s=0.0)
        raise AssertionError("unreachable")

    async def _watched(self, method: str, args: tuple[Any, ...]) -> Any:
        """Await one call, looking now and then whether anyone is left to answer it."""
        answer = asyncio.ensure_future(self._call(method, args))
        try:
            while not (await asyncio.wait([answer], timeout=LOOK_EVERY_S))[0]:
                await self._look_up(max_age_s=LOOK_EVERY_S)
            return await answer
        finally:
            answer.cancel()

    async def _call(self, method: str, args: tuple[Any, ...]) -> Any:
        if self._handle is None:
            await self._look_up(max_age_s=0.0)
        try:
            return await call_handle(self._handle, method, *args, name=self.app_name)
        except BackPressureError as error:
            raise RewardUnavailable(WHERE, f"application {self.app_name} has too many calls waiting", 1.0) from error
        except DeploymentUnavailableError as error:
            self._handle = None
            raise RewardUnavailable(WHERE, f"application {self.app_name} is gone: {error.message}") from error
        except (RayServeException, RayError) as error:
            self._handle = None
            what = f"application {self.app_name}: {type(error).__name__}: {error}"
            raise RewardUnavailable(WHERE, what) from error

    async def _look_up(self, *, max_age_s: float) -> None:
        """Ask Serve for the application unless it was there `max_age_s` ago. Raises RewardUnavailable if it is gone."""
        if time.monotonic() - self._seen_at < max_age_s:
            return
        self._seen_at = time.monotonic()
        try:
            handle = await asyncio.to_thread(serve.get_app_handle, self.app_name)
        except (RayServeException, RayError) as error:
            self._seen_at = -math.inf
            raise RewardUnavailable(WHERE, f"application {self.app_name} is gone: {error}") from error
        if self._handle is None:
            self._handle = handle


class HandleBackend:
    """The application, as the HTTP face asks it."""

    def __init__(self, app_name: str) -> None:
        self._service = ServiceHandle(app_name)

    async def score(self, requests: Sequence[ScoreRequest], *, scorer: str | None, timeout_s: float) -> list[Outcome]:
        """One outcome a request, in their order."""
        waited_for = f"to score {len(requests)} responses"
        outcomes: list[Outcome] = await self._service.call(
            "outcomes", list(requests), scorer, timeout_s=timeout_s, waited_for=waited_for
        )
        return outcomes

    async def models(self, *, timeout_s: float) -> list[ScorerInfo]:
        """The scorers, the default first."""
        models: list[ScorerInfo] = await self._service.call(
            "models", timeout_s=timeout_s, waited_for="to name its scorers"
        )
        return models


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
