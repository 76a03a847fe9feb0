"""What the simulated people of the reviews task want, and whether a review is well formed.

Read by annotators and by evaluation alone. No scorer may import this module: what training sees of it are noisy
labels, so a policy that is good by the oracle has learnt it from preferences.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from examples.reviews.grammar import ASPECTS, CONJUNCTIONS, NEGATIVE, PLAIN, POSITIVE, VIVID, topic_of

MAX_PRAISE = 4
"""The grammar's longest review has four adjectives; more praise than that counts no further."""

_PLAIN, _VIVID, _CONJUNCTION = ("|".join(words) for words in (PLAIN, VIVID, CONJUNCTIONS))
_ADJECTIVES = rf"(?:(?:{_PLAIN}|{_VIVID})|(?:{_PLAIN}) (?:{_CONJUNCTION}) (?:{_VIVID}))"
_REVIEW = {
    topic: re.compile(rf"the {topic} was {_ADJECTIVES}(?: ?, the {aspect} was {_ADJECTIVES})? ?\.")
    for topic, aspect in ASPECTS.items()
}


def oracle(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """What the people think of each response, -4 to 4, whether or not it is well formed."""
    return [praise(response) for response in responses]


def praise(response: str) -> float:
    """Positive minus negative adjectives, between -4 and 4."""
    words = re.findall(r"[a-z]+", response)
    balance = sum(word in POSITIVE for word in words) - sum(word in NEGATIVE for word in words)
    return float(max(-MAX_PRAISE, min(MAX_PRAISE, balance)))


def is_grammatical(prompt: str, response: str) -> bool:
    """Whether the response is a review of the grammar and of the topic that the prompt names."""
    topic = topic_of(prompt)
    return topic is not None and _REVIEW[topic].fullmatch(response.strip()) is not None
