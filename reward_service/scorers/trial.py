"""Calls a user's scorer functions once, so that a broken one is found before anything is loaded."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from cluster.errors import InputError
from cluster.scoring import ScoreRequest
from reward_service.functions.process import FunctionProcess

SIGNATURES = {
    "ours": "f(prompts, responses, **columns) returns a list of numbers, one per response",
    "trl": "f(prompts, completions, **columns) returns a list of numbers, one per completion",
    "openrlhf": "f(queries, prompts, labels) returns a list of numbers, or a dict with rewards",
    "verl": "compute_score(data_source, solution_str, ground_truth) returns a number, or a dict with its score",
    "verl_batch": "compute_score(data_sources, solution_strs, ground_truths) returns a list of numbers or dicts",
}


@dataclass(frozen=True, slots=True)
class Trial:
    """The scorer functions of a task (dotted paths by setting), and a request to score."""

    paths: Mapping[str, str]
    request: ScoreRequest


def try_functions(trials: Sequence[Trial], *, timeout_s: float) -> Iterator[str]:
    """Score each task's request with each of its functions; yields a note for each that does not apply to it.

    Raises InputError with the file and line of a function that raises, returns something else than its signature
    promises, or takes longer than `timeout_s`.
    """
    for trial in trials:
        for where, path in trial.paths.items():
            process = FunctionProcess(path, where, timeout_s=timeout_s)
            try:
                yield from asyncio.run(_try(path, process, trial.request))
            finally:
                process.close()


async def _try(path: str, process: FunctionProcess, request: ScoreRequest) -> list[str]:
    (result,) = await process.results([request])
    if result.error is None:
        note = f"{path} does not apply to the first prompt (it returned None); such groups are voided"
        return [] if result.reward is not None else [f"{note}, unless another part of a composite applies"]
    if result.has_raised:
        raise InputError(result.place, f"{path} {result.error} (for an empty response)")
    if result.error.startswith(("did not return", "its process ended")):
        raise InputError(result.place, f"{path} {result.error}")
    raise InputError(result.place, f"{result.error}: {SIGNATURES[process.info.kind]}")
