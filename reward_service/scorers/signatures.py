"""Calls a user's Python scorer by its signature, and reads one value per item.

The names of the parameters decide the signature, in this order:

- `solution_str` and `ground_truth`: verl's `compute_score(data_source, solution_str, ground_truth, extra_info=None)`,
  called once per item; returns a number, or a dict of `score`, the reward, and other finite numbers, the parts;
- `queries`: OpenRLHF's `reward_func(queries, prompts, labels)`, where a query is prompt + response; returns a list, a
  tensor or a dict of `rewards`, `scores` and `extra_logs`;
- `completions` or `completion_ids`: TRL's `f(prompts, completions, completion_ids, trainer_state, **columns)`; returns
  a list of numbers, None if it does not apply. If the prompts are messages (column `messages`), prompts are lists of
  messages, and a completion is a list of one assistant message. `trainer_state` is None;
- anything else: Antiphon's `f(prompts, responses, **columns)`, the first two by position; returns a list of numbers.

Each may be sync or async. A data column is passed if the function names it or takes `**columns`; a row without it has
None. Labels are the column of that name, else `references`; ground truth is `ground_truth`, else verl's
`reward_model.ground_truth`, else `references`. Every item gets its own copy of its columns. Returned values are not
checked here.
"""

from __future__ import annotations

import asyncio
import copy
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from decimal import Decimal
from numbers import Real
from typing import Any, Literal

from cluster.scoring import ScoreRequest

Kind = Literal["ours", "trl", "openrlhf", "verl"]
MESSAGES, COMPLETION_IDS = "messages", "completion_ids"


@dataclass(frozen=True)
class Returned:
    """A function's value for one item, unchecked, and the finite numbers that came with it."""

    value: Any
    parts: Mapping[str, float] = field(default_factory=dict)


class SignatureMismatch(ValueError):
    """The item lacks what the function needs, or the returned value does not fit the signature."""


@dataclass(frozen=True)
class ColumnParameters:
    """The parameters of a function that take data columns by name."""

    texts: frozenset[str]
    """Leading parameters that take texts by position."""
    named: Mapping[str, bool]
    """The other parameters, each with whether it is required."""
    takes_all: bool
    """Whether the function has `**columns`."""

    def takes(self, name: str) -> bool:
        """Return whether the function takes a column of that name."""
        return name not in self.texts and (self.takes_all or name in self.named)


def column_parameters(function: Callable[..., Any], *, num_texts: int) -> ColumnParameters:
    """Read which columns a function takes; its first `num_texts` parameters take texts by position."""
    parameters = list(inspect.signature(function).parameters.values())
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    plain = [p for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    named = {p.name: p.default is p.empty for p in plain[num_texts:]}
    return ColumnParameters(frozenset(p.name for p in plain[:num_texts]), named, takes_all)


def signature_kind(function: Callable[..., Any]) -> Kind:
    """Return whose signature the function has, by the names of its parameters."""
    names = set(inspect.signature(function).parameters)
    if {"solution_str", "ground_truth"} <= names:
        return "verl"
    if "queries" in names:
        return "openrlhf"
    return "trl" if names & {"completions", "completion_ids"} else "ours"


class FunctionCaller:
    """Calls a user's function in its signature."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.kind = signature_kind(function)
        self._function = function
        self._parameters = column_parameters(function, num_texts=2 if self.kind == "ours" else 0)

    async def __call__(self, requests: Sequence[ScoreRequest], executor: Executor) -> list[Returned]:
        """Return a value per item; run a sync function in `executor`.

        Raises SignatureMismatch and its errors.
        """
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
        if self.kind == "trl":
            texts = self._trl_arguments(requests)
        else:
            labels = [_label(request, "labels") for request in requests]
            queries = [request.prompt + request.response for request in requests]
            texts = {"prompts": prompts, "queries": queries, "labels": labels}
        return [], columns | {name: values for name, values in texts.items() if self._parameters.takes(name)}

    def _trl_arguments(self, requests: Sequence[ScoreRequest]) -> dict[str, Any]:
        """Return TRL's arguments beside the columns. Raises SignatureMismatch without the token ids it requires."""
        arguments: dict[str, Any] = {"trainer_state": None}
        if all(MESSAGES in request.columns for request in requests):
            arguments["prompts"] = [copy.deepcopy(request.columns[MESSAGES]) for request in requests]
            arguments["completions"] = [[{"role": "assistant", "content": each.response}] for each in requests]
        else:
            arguments["prompts"] = [request.prompt for request in requests]
            arguments["completions"] = [request.response for request in requests]
        if self._parameters.named.get(COMPLETION_IDS) and not all(COMPLETION_IDS in each.columns for each in requests):
            raise SignatureMismatch("needs completion_ids, and an item has no column completion_ids")
        return arguments

    def _columns(self, requests: Sequence[ScoreRequest]) -> dict[str, list[Any]]:
        """Return the columns that the function takes: one value per request, None if missing."""
        names = dict.fromkeys(name for request in requests for name in request.columns)
        return {
            name: [copy.deepcopy(request.columns.get(name)) for request in requests]
            for name in names
            if self._parameters.takes(name)
        }

    def _verl_arguments(self, request: ScoreRequest) -> dict[str, Any]:
        truth = _ground_truth(request)
        if truth is None:
            raise SignatureMismatch(
                "needs a ground truth, and the item has neither ground_truth nor references "
                "nor reward_model.ground_truth"
            )
        arguments = {
            "data_source": request.columns.get("data_source", ""),
            "solution_str": request.response,
            "ground_truth": truth,
            "extra_info": request.columns.get("extra_info"),
        }
        return {name: copy.deepcopy(value) for name, value in arguments.items() if self._parameters.takes(name)}

    async def _call(self, executor: Executor, *positional: Any, **named: Any) -> Any:
        if inspect.iscoroutinefunction(self._function):
            return await self._function(*positional, **named)
        loop = asyncio.get_running_loop()
        returned = await loop.run_in_executor(executor, lambda: self._function(*positional, **named))
        return await returned if inspect.isawaitable(returned) else returned


def _label(request: ScoreRequest, name: str) -> Any:
    return request.columns.get(name, request.columns.get("references"))


def _ground_truth(request: ScoreRequest) -> Any:
    """Return verl's ground truth: the column of that name, else the one inside `reward_model`, else `references`."""
    nested = request.columns.get("reward_model")
    inner = nested.get("ground_truth") if isinstance(nested, Mapping) else None
    own = request.columns.get("ground_truth")
    return next((each for each in (own, inner) if each is not None), request.columns.get("references"))


def _plain(values: Any) -> Any:
    """Convert a tensor or an array to lists and numbers, and a Decimal to a float, without importing torch or numpy."""
    if isinstance(values, Decimal):
        return float(values)
    return values.tolist() if hasattr(values, "tolist") else values


def _number(value: Any) -> Any:
    """Convert a number of any library, or a tensor or an array of one number, to a Python number."""
    plain = _plain(value)
    while hasattr(value, "tolist") and isinstance(plain, list) and len(plain) == 1:
        plain = plain[0]
    return plain


def _listed(values: Any, num: int) -> list[Returned]:
    values = _plain(values)
    if not isinstance(values, list | tuple):
        raise SignatureMismatch(f"returned {type(values).__name__}, not a list")
    if len(values) != num:
        raise SignatureMismatch(f"returned {len(values)} rewards for {num} responses")
    return [Returned(_number(value)) for value in values]


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
                parts[position] |= _finite_numbers({str(name): value})
    return [Returned(reward.value, part) for reward, part in zip(rewards, parts, strict=True)]


def _from_verl(returned: Any) -> Returned:
    if isinstance(returned, Mapping):
        others = {str(name): value for name, value in returned.items() if name != "score"}
        return Returned(_number(returned.get("score")), _finite_numbers(others))
    if isinstance(returned, list | tuple) and returned:
        return Returned(_number(returned[0]))
    return Returned(_number(returned))


def _finite_numbers(values: Mapping[str, Any]) -> dict[str, float]:
    plain = {name: _number(value) for name, value in values.items()}
    return {name: float(value) for name, value in plain.items() if isinstance(value, Real) and math.isfinite(value)}
