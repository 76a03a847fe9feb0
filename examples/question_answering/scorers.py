"""Reward of an answer: 1 if right, 0 for "I don't know", -1 if wrong.

Answers are compared as in SQuAD (Rajpurkar et al. 2016, arXiv:1606.05250): without case, punctuation and articles.
If a question can't be answered, "I don't know" is one of its references, so that it is right.
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from typing import Any

ABSTENTIONS = ("i dont know", "i do not know", "unknown", "unanswerable", "not stated", "the article does not say")
RIGHT, ABSTAINED, WRONG = 1.0, 0.0, -1.0


def answer_reward(
    prompts: Sequence[str], responses: Sequence[str], *, references: Sequence[Sequence[str]], **columns: Any
) -> list[float]:
    """Return one reward per response. `references` holds the right answers of each question."""
    return [verdict(response, right) for response, right in zip(responses, references, strict=True)]


def verdict(response: str, references: Sequence[str]) -> float:
    """Return RIGHT, ABSTAINED or WRONG. An empty response is wrong."""
    answer = normalized(response)
    right = {normalized(reference) for reference in references}
    if answer in right or (right & abstentions() and answer in abstentions()):
        return RIGHT
    return ABSTAINED if answer in abstentions() else WRONG


def abstentions() -> set[str]:
    """Return the normalised texts that count as abstention."""
    return {normalized(text) for text in ABSTENTIONS}


def normalized(text: str) -> str:
    """Return the text without case, punctuation, articles and extra spaces."""
    text = "".join(character for character in text.casefold() if character not in string.punctuation + "’")
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())
