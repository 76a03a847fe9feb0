"""Calls a user's Python scorer in the signature it has, and reads what it returned as one value an item.

The signature is told by the names of the parameters, looked at in this order:

- `solution_str` and `ground_truth`: verl's `compute_score(data_source, solution_str, ground_truth, extra_info=None)`,
  once an item; a number, or a dict whose `score` is the reward and whose other finite numbers are parts;
- `queries`: OpenRLHF's `reward_func(queries, prompts, labels)`, where a query is prompt + response; a list, a tensor or
  a dict of `rewards`, `scores` and `extra_logs`;
- `completions`: TRL's `f(prompts, completions, **columns)`; a list of numbers, None where it does not judge the item;
- anything else: ours, `f(prompts, responses, **columns)`, the first two by position; a list of numbers.

Each may be sync or async. A column of the data is handed on where the function names it or takes `**columns`; a row
that lacks it has None. Labels and ground truth are the column of that name, else `references`.
Knows neither models nor transport; believes nothing it gets back.
"""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, Literal

from cluster.scoring import ScoreRequest

Kind = Literal["ours", "trl", "openrlhf", "verl"]


@dataclass(frozen=True)
class Returned:
    """What a function gave for one item, unchecked: the reward it means, and finite numbers beside it."""

    value: Any
    parts: Mapping[str, float] = field(default_factory=dict)


class SignatureMismatch(ValueError):
    """What a function needs is not there, or what it returned is not what its signature says."""


def signature_kind(function: Callable[..., Any]) -> Kind:
    """Whose signature the function has, by the names of its parameters."""
    names = set(inspect.signature(function).parameters)
    if {"solution_str", "ground_truth"} <= names:
        return "verl"
    if "queries" in names:
        return "openrlhf"
    return "trl" if "completions" in names else "ours"


class Plugin:
    """A user's function with its signature."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.kind = signature_kind(function)
        self._function = function
        self._accepted = _accepted_names(function)

    async def __call__(self, requests: Sequence[ScoreRequest], executor: Executor) -> list[Returned]:
        """Return a value per item; run a sync function in `executor`. Raises SignatureMismatch and its errors."""
        if self.kind == "verl":
            arguments = [self._verl_arguments(request) for request in requests]
            return [_from_verl(await self._call(executor, **each)) for each in arguments]
        positional, named = self._arguments(requests)
        returned = await self._call(executor, *positional, **named)
        return _from_openrlhf(returned, len(requests)) if self.kind == "openrlhf" else _listed(returned, len(requests))

    def _arguments(self, requests: Sequence[ScoreRequest]) -> tuple[list[Any], dict[str, list[Any]]]:
        prompts = [request.prompt for request in requests]
        responses = [request.response for request in requests]
        columns = self._columns(requests)
        if self.kind == "ours":
            return [prompts, responses], columns
        texts: dict[str, list[Any]] = {"prompts": prompts}
        if self.kind == "trl":
            texts["completions"] = responses
        else:
            texts["queries"] = [request.prompt + request.response for request in requests]
            texts["labels"] = [_label(request, "labels") for request in requests]
        return [], columns | {name: values for name, values in texts.items() if self._takes(name)}

    def _columns(self, requests: Sequence[ScoreRequest]) -> dict[str, list[Any]]:
        """Every column that any request has and the function takes, one value a request (None where it has none)."""
        names = dict.fromkeys(name for request in requests for name in request.columns)
        return {name: [request.columns.get(name) for request in requests] for name in names if self._takes(name)}

    def _takes(self, name: str) -> bool:
        return self._accepted is None or name in self._accepted

    def _verl_arguments(self, request: ScoreRequest) -> dict[str, Any]:
        truth = _label(request, "ground_truth")
        if truth is None:
            raise SignatureMismatch("needs a ground truth, and the item has neither ground_truth nor references")
        given = {
            "data_source": request.columns.get("data_source", ""),
            "solution_str": request.response,
            "ground_truth": truth,
            "extra_info": request.columns.get("extra_info"),
        }
        return {name: value for name, value in given.items() if self._takes(name)}

    async def _call(self, executor: Executor, *positional: Any, **named: Any) -> Any:
        if inspect.iscoroutinefunction(self._function):
            return await self._function(*positional, **named)
        loop = asyncio.get_running_loop()
        returned = await loop.run_in_executor(executor, lambda: self._function(*positional, **named))
        return await returned if inspect.isawaitable(returned) else returned


def _accepted_names(function: Callable[..., Any]) -> frozenset[str] | None:
    """Names that the function takes; None when it takes all (`**columns`). Ours have two by position first."""
    parameters = list(inspect.signature(function).parameters.values())
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None
    skipped = 2 if signature_kind(function) == "ours" else 0
    return frozenset(parameter.name for parameter in parameters[skipped:])


def _label(request: ScoreRequest, name: str) -> Any:
    return request.columns.get(name, request.columns.get("references"))


def _plain(values: Any) -> Any:
    """Lists for what tensors and arrays hold, without importing what they are of."""
    return values.tolist() if hasattr(values, "tolist") else values


def _listed(values: Any, num: int) -> list[Returned]:
    values = _plain(values)
    if not isinstance(values, list | tuple):
        raise SignatureMismatch(f"returned {type(values).__name__}, not a list")
    if len(values) != num:
        raise SignatureMismatch(f"returned {len(values)} rewards for {num} responses")
    return [Returned(_plain(value)) for value in values]


def _from_openrlhf(returned: Any, num: int) -> list[Returned]:
    if not isinstance(returned, Mapping):
        return _listed(returned, num)
    if "rewards" not in returned:
        raise SignatureMismatch(f"returned a dict of {sorted(map(str, returned))}, without rewards")
    rewards = _listed(returned["rewards"], num)
    logs = {"scores": returned.get("scores"), **(returned.get("extra_logs") or {})}
    parts: list[dict[str, float]] = [{} for _ in rewards]
    for name, values in logs.items():
        values = _plain(values)
        if isinstance(values, list | tuple) and len(values) == num:
            for position, value in enumerate(values):
                parts[position] |= _finite({str(name): value})
    return [Returned(reward.value, part) for reward, part in zip(rewards, parts, strict=True)]


def _from_verl(returned: Any) -> Returned:
    if isinstance(returned, Mapping):
        others = {str(name): value for name, value in returned.items() if name != "score"}
        return Returned(_plain(returned.get("score")), _finite(others))
    return Returned(_plain(returned))


def _finite(values: Mapping[str, Any]) -> dict[str, float]:
    plain = {name: _plain(value) for name, value in values.items()}
    return {name: float(value) for name, value in plain.items() if isinstance(value, Real) and math.isfinite(value)}
