"""How many answers are right, and how many of the steps before them: the reward sees the answers alone."""

from __future__ import annotations

import re
from collections.abc import Sequence
from statistics import fmean

ANSWER = re.compile(r"answer is\s*:?\s*(-?\d+)", re.IGNORECASE)
"""The run file's scorer finds the answer by the same words."""
STEP = re.compile(r"(-?\d+)\s*([-+])\s*(\d+)\s*=\s*(-?\d+)")


def evaluate(prompts: Sequence[str], responses: Sequence[str], *, references: Sequence[str]) -> dict[str, float]:
    """The shares of right answers, of right ones among all the steps, and of answers that the last step comes to."""
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
    """The last answer that a response gives."""
    found = ANSWER.findall(response)
    return int(found[-1]) if found else None


def is_right(step: tuple[str, str, str, str]) -> bool:
    """Whether a step's result is what it says on the left."""
    first, sign, second, result = step
    return int(result) == int(first) + (int(second) if sign == "+" else -int(second))
