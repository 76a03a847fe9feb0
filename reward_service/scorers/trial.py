"""A first call of the functions that people bring as scorers, so that a broken one is found before anything is loaded.

Knows no service: it calls each function with one request, and looks at what comes back.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.errors import InputError, NotApplicable, RewardError
from cluster.scoring import ScoreRequest
from cluster.user_code import line_that_raised, place_of
from reward_service.scorers import signatures
from reward_service.scorers.function import FunctionScorer
from reward_service.scorers.registry import load_function

SIGNATURES = {
    "ours": "f(prompts, responses, **columns) gives a list of numbers, one a response",
    "trl": "f(prompts, completions, **columns) gives a list of numbers, one a completion",
    "openrlhf": "f(queries, prompts, labels) gives a list of numbers, or a dict with rewards",
    "verl": "compute_score(data_source, solution_str, ground_truth) gives a number, or a dict with its score",
}


@dataclass(frozen=True, slots=True)
class Trial:
    """The functions of a task, each at its dotted path, by the setting that names it; and what they are to score."""

    paths: Mapping[str, str]
    request: ScoreRequest


def try_functions(trials: Sequence[Trial], *, timeout_s: float) -> Iterator[int]:
    """Score each task's request with each of its functions; yields how many there were.

    Raises InputError naming the file and line of one that raises, gives back something else than its signature says,
    or takes longer than that.
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
    except Exception as error:  # the boundary to a user's scorer: whatever it raises is named
        if limit.expired():
            raise InputError(place_of(function), f"{path} gave no answer within {timeout_s:g} s") from error
        where = line_that_raised(function, error, caller=signatures.__file__)
        raise InputError(where, f"{path} raised {type(error).__name__}: {error} (for an empty response)") from error
    finally:
        scorer.close()
    outcome = scorer.outcome(request, value)
    if isinstance(outcome, RewardError) and not isinstance(outcome, NotApplicable):
        raise InputError(place_of(function), f"{outcome.what}: {signature}")
