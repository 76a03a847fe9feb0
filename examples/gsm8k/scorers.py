"""Reward and metrics of GSM8K: the number behind the last ``####`` of a response, compared with the reference's."""

from __future__ import annotations

import re
from collections.abc import Sequence
from statistics import fmean

from reward_service.parsing.numbers import number_of

ANSWER = re.compile(r"####\s*([^\n]+)")
FORMAT_REWARD = 0.1
"""Reward of a wrong number in the right form."""


def reward(prompts: Sequence[str], responses: Sequence[str], *, references: Sequence[str]) -> list[float]:
    """Return 1 for the right number, FORMAT_REWARD for another number behind ``####``, else 0."""
    return [_reward(answer_of(response), right) for response, right in zip(responses, references, strict=True)]


def evaluate(prompts: Sequence[str], responses: Sequence[str], *, references: Sequence[str]) -> dict[str, float]:
    """Return the share of right answers, the share with a number in the right form, and the length in words."""
    rewards = reward(prompts, responses, references=references)
    return {
        "accuracy": fmean(value == 1 for value in rewards),
        "answered": fmean(value > 0 for value in rewards),
        "num_words": fmean(len(response.split()) for response in responses),
    }


def answer_of(text: str) -> float | None:
    """Return the number behind the last ``####`` of a text, without a currency sign and a full stop, or None."""
    found = ANSWER.findall(text)
    return number_of(found[-1].strip().strip("$").rstrip(".")) if found else None


def _reward(answer: float | None, reference: str) -> float:
    """Score an answer; a reference is a number, or GSM8K's whole solution."""
    right = answer_of(reference) if "####" in reference else number_of(reference)
    if right is None:
        raise ValueError(f"the reference {reference!r} is neither a number nor ends with one behind ####")
    if answer is None:
        return 0.0
    return 1.0 if answer == right else FORMAT_REWARD
