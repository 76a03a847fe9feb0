"""The kind `function`: a scorer that calls a user's Python function.

A reward that the function does not give is a RewardError outcome, never a number.
"""

from __future__ import annotations

from collections.abc import Sequence

from cluster.data.unicode_text import as_unicode
from cluster.errors import BatchFailed, NotApplicable, RewardError
from cluster.scoring import Outcome, Score, ScoreRequest
from reward_service.config.scorers import FunctionConfig
from reward_service.functions.process import FunctionProcess, check_path
from reward_service.functions.results import Result
from reward_service.scorers.scorer import Builder, Kind, Scorer, register_kind, setting_key

DEADLINE_SHARE = 0.9
"""Share of the deadline of a scoring call after which a function's call is ended, so that its error still arrives."""


class FunctionScorer:
    """Calls a user's function in any signature of `functions.signatures`, in a process of its own.

    Errors carry `name`. If `name` is a dotted path, the reward's part has the function's name. Raises InputError if
    the function can't be imported or called.
    """

    def __init__(self, name: str, path: str, key: str, *, timeout_s: float) -> None:
        self.name = name
        self.process = FunctionProcess(path, key, timeout_s=DEADLINE_SHARE * timeout_s)
        self.version = f"{name}@{self.process.info.digest}"

    async def score(self, requests: Sequence[ScoreRequest]) -> list[Outcome]:
        """Return one outcome per request, in order."""
        if not requests:
            return []
        results = await self.process.results(requests)
        return [
            outcome(request, result, name=self.name, version=self.version)
            for request, result in zip(requests, results, strict=True)
        ]

    def close(self) -> None:
        """End the process."""
        self.process.close()


def outcome(request: ScoreRequest, result: Result, *, name: str, version: str) -> Outcome:
    """Return a function's result as the outcome of a request."""
    if result.error is not None:
        place = f" at {result.place}" if result.has_raised else ""
        error, of = (BatchFailed, f", one of {result.num_items}") if result.num_items > 1 else (RewardError, "")
        return error(name, f"{result.error}{place} (scoring {request.id}{of})")
    if result.reward is None:
        return NotApplicable(name, f"does not apply to {request.id} (it returned None)")
    parts = as_unicode({**result.parts, name.rpartition(":")[2]: result.reward})
    return Score(request.id, result.reward, parts, version)


def _build(name: str, config: FunctionConfig, builder: Builder) -> Scorer:
    return FunctionScorer(name, config.path, setting_key(name, "path"), timeout_s=builder.timeout_s)


def _check_environment(name: str, config: FunctionConfig) -> None:
    check_path(config.path, setting_key(name, "path"))


register_kind(FunctionConfig, Kind(_build, check_environment=_check_environment))
