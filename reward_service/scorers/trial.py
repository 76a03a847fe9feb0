"""Calls a user's scorer functions once, so that a broken one is found before anything is loaded."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.errors import InputError, NotApplicable, RewardError
from cluster.scoring import ScoreRequest
from cluster.user_code import line_that_raised, place_of
from reward_service.scorers import signatures
from reward_service.scorers.function import FunctionScorer, load_function, what_raised

SIGNATURES = {
    "ours": "f(prompts, responses, **columns) returns a list of numbers, one per response",
    "trl": "f(prompts, completions, **columns) returns a list of numbers, one per completion",
    "openrlhf": "f(queries, prompts, labels) returns a list of numbers, or a dict with rewards",
    "verl": "compute_score(data_source, solution_str, ground_truth) returns a number, or a dict with its score",
}


@dataclass(frozen=True, slots=True)
class Trial:
    """The scorer functions of a task (dotted paths by setting), and a request to score."""

    paths: Mapping[str, str]
    request: ScoreRequest


def try_functions(trials: Sequence[Trial], *, timeout_s: float) -> Iterator[int]:
    """Score each task's request with each of its functions; yields the number of functions.

    Raises InputError with the file and line of a function that raises, returns something else than its signature
    promises, or takes longer than `timeout_s`.
    """
    for trial in trials:
        for where, path in trial.paths.items():
            asyncio.run(_try(path, load_function(path, where), trial.request, timeout_s))
    yield sum(len(trial.paths) for trial in trials)


async def _try(path: str, function: Callable[..., Any], request: ScoreRequest, timeout_s: float) -> None:
    scorer = FunctionScorer(path, function)
    signature = SIGNATURES[signatures.signature_kind(function)]
    limit = asyncio.timeout(timeout_s)
    try:
        async with limit:
            (value,) = await scorer.call([request])
    except signatures.SignatureMismatch as error:
        raise InputError(place_of(function), f"{error}: {signature}") from error
    except Exception as error:  # boundary to a user's scorer: the error names what it raised
        if limit.expired():
            raise InputError(place_of(function), f"{path} did not return within {timeout_s:g} s") from error
        where = line_that_raised(function, error, caller=signatures.__file__)
        raise InputError(where, f"{path} raised {what_raised(error)} (for an empty response)") from error
    finally:
        scorer.close()
    outcome = scorer.outcome(request, value)
    if isinstance(outcome, RewardError) and not isinstance(outcome, NotApplicable):
        raise InputError(place_of(function), f"{outcome.what}: {signature}")
