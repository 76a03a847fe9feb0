"""Metrics of question answering: the shares of right answers, wrong answers and abstentions."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from examples.question_answering.scorers import ABSTAINED, RIGHT, WRONG, verdict


def evaluate(
    prompts: Sequence[str],
    responses: Sequence[str],
    *,
    references: Sequence[Sequence[str]],
    answerable: Sequence[bool] | None = None,
) -> dict[str, float]:
    """Return exact match and the shares of wrong answers and abstentions.

    With `answerable`, also `left_open`: the share of unanswerable questions to which the response is "I don't know.".
    """
    verdicts = [verdict(response, right) for response, right in zip(responses, references, strict=True)]
    measured = {
        "exact_match": fmean(each == RIGHT for each in verdicts),
        "wrong": fmean(each == WRONG for each in verdicts),
        "abstained": fmean(each == ABSTAINED for each in verdicts),
    }
    unanswerable = [v for v, has_answer in zip(verdicts, answerable or (), strict=False) if not has_answer]
    return measured | ({"left_open": fmean(v == RIGHT for v in unanswerable)} if unanswerable else {})
