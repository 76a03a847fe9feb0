"""Reward and evaluation of the letters task: the share of the letter a."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

RESPONSE_LENGTH = 16


def count_a(prompts: Sequence[str], responses: Sequence[str], **columns: Any) -> list[float]:
    """Return the number of `a` in each response over the response length of 16."""
    return [response.count("a") / RESPONSE_LENGTH for response in responses]


def evaluate(prompts: Sequence[str], responses: Sequence[str]) -> dict[str, float]:
    """Return the mean share of `a` (0 to 1)."""
    return {"share_of_a": fmean(count_a(prompts, responses))}
