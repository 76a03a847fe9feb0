"""The reward of the letters task, a plain function, and the same number as its evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

RESPONSE_LENGTH = 16


def count_a(prompts: Sequence[str], responses: Sequence[str], **columns: Any) -> list[float]:
    """The share of the sixteen places of a response that hold an `a`."""
    return [response.count("a") / RESPONSE_LENGTH for response in responses]


def evaluate(prompts: Sequence[str], responses: Sequence[str]) -> dict[str, float]:
    """The mean share of `a` (0 to 1)."""
    return {"share_of_a": fmean(count_a(prompts, responses))}
