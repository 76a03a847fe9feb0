"""Metrics of reasoning: right answers and right steps. The reward depends only on the answers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from statistics import fmean

ANSWER = re.compile(r"answer is\s*:?\s*(-?\d+)", re.IGNORECASE)
"""The run file's scorer uses the same pattern."""
STEP = re.compile(r"(-?\d+)\s*([-+])\s*(\d+)\s*=\s*(-?\d+)")


def evaluate(prompts: Sequence[str], responses: Sequence[str], *, references: Sequence[str]) -> dict[str, float]:
    """Return the shares of right answers, of right steps, and of answers equal to the last step's result."""
    steps = [STEP.findall(response) for response in responses]
    answers = [answer_of(response) for response in responses]
    return {
        "accuracy": fmean(answer == int(right) for answer, right in zip(answers, references, strict=True)),
        "steps_right": fmean([is_right(step) for each in steps for step in each] or [0.0]),
        "steps_lead_to_answer": fmean(
            bool(each) and int(each[-1][3]) == answer for each, answer in zip(steps, answers, strict=True)
        ),
    }


def answer_of(response: str) -> int | None:
    """Return the last answer in a response, or None."""
    found = ANSWER.findall(response)
    return int(found[-1]) if found else None


def is_right(step: tuple[str, str, str, str]) -> bool:
    """Return whether a step's result is the value of its left side."""
    first, sign, second, result = step
    return int(result) == int(first) + (int(second) if sign == "+" else -int(second))
