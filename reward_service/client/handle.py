"""Calls the Serve application of a reward service by its handle.

Scoring has no side effects, so a call whose replica died is repeated on another replica.
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
from cluster.scoring import Outcome, ScoreRequest
from reward_service.backend import ScorerInfo
from reward_service.client.outcomes import WHERE, check_outcomes
from reward_service.config.service import app_name

LOOK_EVERY_S = 2.0
"""How often a waiting call checks that the application still exists."""
REPLICA_PAUSE_S = 0.05
"""Pause before a call whose replica died is repeated."""
MAX_DEATHS = 4
"""Replicas that may die during one call: a call that kills its replica must not kill all of them."""


class ServiceHandle:
    """A handle of one application on this process's Ray; can be pickled at any time."""

    def __init__(self, app_name: str) -> None:
        self.app_name = app_name
        self._handle: Any = None
        self._seen_at = -math.inf

    def __reduce__(self) -> tuple[Any, ...]:
        return (ServiceHandle, (self.app_name,))

    async def call(self, method: str, *args: Any, timeout_s: float, waited_for: str) -> Any:
        """Return the method's result from any replica.

        Raises what the method raises; RewardError if the call killed several replicas in a row; RewardUnavailable if
        the application is gone, broken or has too many waiting calls; DeadlineExceeded after `timeout_s`.
        """
        waited_for = f"application {self.app_name} {waited_for}"
        return await within(self._call_any_replica(method, args), timeout_s, where=WHERE, waited_for=waited_for)

    async def _call_any_replica(self, method: str, args: tuple[Any, ...]) -> Any:
        for left in reversed(range(MAX_DEATHS)):
            try:
                return await self._call(method, args)
            except ActorDied as error:
                if not left:
                    what = f"{MAX_DEATHS} replicas of {self.app_name} died one after the other with this call"
                    raise RewardError(WHERE, f"{what}: {error.what}") from error
            await asyncio.sleep(REPLICA_PAUSE_S)
            await self._look_up(max_age_s=0.0)
        raise AssertionError("unreachable")

    async def _call(self, method: str, args: tuple[Any, ...]) -> Any:
        """Await one call; check every LOOK_EVERY_S that the application still exists."""
        if self._handle is None:
            await self._look_up(max_age_s=0.0)
        call = asyncio.ensure_future(call_handle(self._handle, method, *args, name=self.app_name))
        try:
            while not (await asyncio.wait([call], timeout=LOOK_EVERY_S))[0]:
                await self._look_up(max_age_s=LOOK_EVERY_S)
            return await call
        except BackPressureError as error:
            raise RewardUnavailable(WHERE, f"application {self.app_name} has too many calls waiting", 1.0) from error
        except DeploymentUnavailableError as error:
            self._handle = None
            raise RewardUnavailable(WHERE, f"application {self.app_name} is gone: {error.message}") from error
        except (RayServeException, RayError) as error:
            self._handle = None
            what = f"application {self.app_name}: {type(error).__name__}: {error}"
            raise RewardUnavailable(WHERE, what) from error
        finally:
            call.cancel()

    async def _look_up(self, *, max_age_s: float) -> None:
        """Ask Serve for the application unless it existed `max_age_s` ago.

        Raises RewardUnavailable if it is gone.
        """
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
    """The application as the backend of the HTTP server."""

    def __init__(self, app_name: str) -> None:
        self._service = ServiceHandle(app_name)

    async def score(self, requests: Sequence[ScoreRequest], *, scorer: str | None, timeout_s: float) -> list[Outcome]:
        """Return one outcome per request, in order."""
        waited_for = f"to score {len(requests)} responses"
        outcomes: list[Outcome] = await self._service.call(
            "outcomes", list(requests), scorer, timeout_s=timeout_s, waited_for=waited_for
        )
        return outcomes

    async def models(self, *, timeout_s: float) -> list[ScorerInfo]:
        """Return the scorers, the default first."""
        models: list[ScorerInfo] = await self._service.call(
            "models", timeout_s=timeout_s, waited_for="to list its scorers"
        )
        return models


class HandleRewardClient:
    """Calls the reward service of the run `run_name` on this process's Ray.

    `scorer` names the scorer to use; None means the service's default.
    """

    def __init__(self, run_name: str, timeout_s: float, scorer: str | None = None) -> None:
        self._run_name = run_name
        self._timeout_s = timeout_s
        self._scorer = scorer
        self._service = ServiceHandle(app_name(run_name))

    def __reduce__(self) -> tuple[Any, ...]:
        return (HandleRewardClient, (self._run_name, self._timeout_s, self._scorer))

    async def outcomes(self, requests: Sequence[ScoreRequest]) -> list[Outcome]:
        """Return one outcome per request, in order: its score, or the RewardError of its scorer."""
        waited_for = f"to score {len(requests)} responses"
        try:
            outcomes = await self._service.call(
                "outcomes", list(requests), self._scorer, timeout_s=self._timeout_s, waited_for=waited_for
            )
        except DeadlineExceeded as error:
            raise RewardUnavailable(WHERE, error.what) from error
        return check_outcomes(requests, outcomes)

    async def aclose(self) -> None:
        """Do nothing: a handle has no connection of its own to close."""
