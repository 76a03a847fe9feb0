"""Reads what a user's function returned: one result per item, as plain numbers.

Imports neither torch nor numpy: their numbers, tensors and arrays are recognised by their methods.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field
from decimal import Decimal
from numbers import Real
from typing import Any


class SignatureMismatch(ValueError):
    """The item lacks what the function needs, or the returned value does not fit the signature."""


@dataclass(frozen=True)
class Result:
    """A function's result for one item: a finite reward, an error, or neither if the function does not apply."""

    reward: float | None = None
    parts: Mapping[str, float] = field(default_factory=dict)
    error: str | None = None
    place: str = ""
    """`file:line` that raised, or of the function if it returned something wrong."""
    has_raised: bool = False
    """The error is an exception of the function, not a wrong value."""
    num_items: int = 1
    """Items of the call whose error it is; with several, some may succeed without the others."""


@dataclass(frozen=True)
class Returned:
    """A function's value for one item, unchecked, and the finite numbers that came with it."""

    value: Any
    parts: Mapping[str, float] = field(default_factory=dict)


def result_of(returned: Returned, *, may_be_none: bool) -> Result:
    """Return the result of a returned value; an error says what is wrong with it."""
    value = returned.value
    if value is None and may_be_none:
        return Result(parts=returned.parts)
    if not isinstance(value, Real):
        return Result(error=f"returned {_short(value)}, not a number")
    try:
        reward = float(value)
    except (OverflowError, ValueError):
        reward = math.inf
    if not math.isfinite(reward):
        return Result(error=f"returned {_short(value)}, not a finite number")
    return Result(reward, returned.parts)


def listed(values: Any, num: int) -> list[Returned]:
    """Return the values of a list, array, tensor or other sequence. Raises SignatureMismatch for anything else."""
    is_array = hasattr(values, "tolist")
    plain = _plain(values)
    if isinstance(plain, str | bytes | Mapping | Set) or not isinstance(plain, Iterable):
        raise SignatureMismatch(f"returned {type(plain).__name__}, not a list")
    plain = list(plain)
    if len(plain) != num:
        raise SignatureMismatch(f"returned {len(plain)} rewards for {num} responses")
    if is_array:
        plain = [value[0] if isinstance(value, list) and len(value) == 1 else value for value in plain]
    return [Returned(_number(value)) for value in plain]


def from_openrlhf(returned: Any, num: int) -> list[Returned]:
    """Return the values of OpenRLHF's list, tensor or dict of `rewards`, `scores` and `extra_logs`."""
    if not isinstance(returned, Mapping):
        return listed(returned, num)
    if "rewards" not in returned:
        raise SignatureMismatch(f"returned a dict of {sorted(map(str, returned))}, without rewards")
    logs = {"scores": returned.get("scores"), **(returned.get("extra_logs") or {})}
    return with_logs(listed(returned["rewards"], num), logs)


def from_verl(returned: Any) -> Returned:
    """Return the value of verl's number, dict with `score`, or tuple with the score first."""
    if isinstance(returned, Mapping):
        if "score" not in returned:
            raise SignatureMismatch(f"returned a dict of {sorted(map(str, returned))}, without score")
        others = {str(name): value for name, value in returned.items() if name != "score"}
        return Returned(_number(returned["score"]), _finite_numbers(others))
    if isinstance(returned, list | tuple) and returned:
        return Returned(_number(returned[0]))
    return Returned(_number(returned))


def from_verl_batch(returned: Any, num: int) -> list[Returned]:
    """Return the values of a verl function that scores a batch: one per item, each as `from_verl` reads it."""
    plain = returned if isinstance(returned, list | tuple) else [each.value for each in listed(returned, num)]
    if len(plain) != num:
        raise SignatureMismatch(f"returned {len(plain)} rewards for {num} responses")
    return [from_verl(value) for value in plain]


def with_logs(rewards: list[Returned], logs: Mapping[str, Any]) -> list[Returned]:
    """Add what a function logged to the parts: a list has a value per item, a number is that of every item.

    Only finite numbers are kept.
    """
    num, parts = len(rewards), [dict(reward.parts) for reward in rewards]
    for name, values in logs.items():
        values = _plain(values)
        if not isinstance(values, list | tuple):
            values = [values] * num
        if len(values) == num:
            for position, value in enumerate(values):
                parts[position] |= _finite_numbers({str(name): value})
    return [Returned(reward.value, part) for reward, part in zip(rewards, parts, strict=True)]


def _plain(values: Any) -> Any:
    """Convert a tensor or an array to lists and numbers, and a Decimal to a float."""
    if isinstance(values, Decimal):
        return math.nan if values.is_nan() else float(values)
    return values.tolist() if hasattr(values, "tolist") else values


def _number(value: Any) -> Any:
    """Convert a number of any library, or a tensor or an array of one number, to a Python number."""
    plain = _plain(value)
    while hasattr(value, "tolist") and isinstance(plain, list) and len(plain) == 1:
        plain = plain[0]
    return plain


def _finite_numbers(values: Mapping[str, Any]) -> dict[str, float]:
    found = {}
    for name, value in values.items():
        result = result_of(Returned(_number(value)), may_be_none=False)
        if result.reward is not None:
            found[name] = result.reward
    return found


def _short(value: Any) -> str:
    return f"{type(value).__name__} {repr(value)[:60]}"
