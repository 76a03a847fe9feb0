"""Oracle of the reviews task: how good a review is, and whether it is grammatical.

Only annotators and evaluation import this module, no scorer: training gets only the annotators' noisy labels, so a
policy that is good by the oracle has learnt it from preferences.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from examples.reviews.grammar import ASPECTS, CONJUNCTIONS, NEGATIVE, PLAIN, POSITIVE, VIVID, topic_of

MAX_PRAISE = 4
"""The grammar's longest review has four adjectives; praise beyond that does not count."""

_PLAIN, _VIVID, _CONJUNCTION = ("|".join(words) for words in (PLAIN, VIVID, CONJUNCTIONS))
_ADJECTIVES = rf"(?:(?:{_PLAIN}|{_VIVID})|(?:{_PLAIN}) (?:{_CONJUNCTION}) (?:{_VIVID}))"
_REVIEW = {
    topic: re.compile(rf"the {topic} was {_ADJECTIVES}(?: ?, the {aspect} was {_ADJECTIVES})? ?\.")
    for topic, aspect in ASPECTS.items()
}


def oracle(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """Return the score of each response, -4 to 4, whether or not it is grammatical."""
    return [praise(response) for response in responses]


def praise(response: str) -> float:
    """Return the number of positive minus negative adjectives, limited to -4 to 4."""
    words = re.findall(r"[a-z]+", response)
    balance = sum(word in POSITIVE for word in words) - sum(word in NEGATIVE for word in words)
    return float(max(-MAX_PRAISE, min(MAX_PRAISE, balance)))


def is_grammatical(prompt: str, response: str) -> bool:
    """Return whether the response is a review of the grammar about the prompt's topic."""
    topic = topic_of(prompt)
    return topic is not None and _REVIEW[topic].fullmatch(response.strip()) is not None
