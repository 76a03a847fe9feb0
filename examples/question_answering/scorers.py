"""The reward of an answer: right is 1, "I don't know" is 0, wrong is -1.

Answers are compared as SQuAD does (Rajpurkar et al. 2016, arXiv:1606.05250): without case, punctuation and articles.
Where a question can't be answered, "I don't know" is among its references, and so is right.
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
    """One reward a response; `references` are each question's right answers."""
    return [verdict(response, right) for response, right in zip(responses, references, strict=True)]


def verdict(response: str, references: Sequence[str]) -> float:
    """RIGHT, ABSTAINED or WRONG; an empty response answers nothing, and is wrong."""
    said = normalized(response)
    right = {normalized(reference) for reference in references}
    if said in right or (right & abstentions() and said in abstentions()):
        return RIGHT
    return ABSTAINED if said in abstentions() else WRONG


def abstentions() -> set[str]:
    """What counts as not answering, normalised."""
    return {normalized(text) for text in ABSTENTIONS}


def normalized(text: str) -> str:
    """The text as it is compared."""
    text = "".join(character for character in text.casefold() if character not in string.punctuation + "’")
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())
