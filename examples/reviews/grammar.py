"""Grammar of the reviews task: a prompt names what was tried, and a completion is a short review of it.

    we tried the new film on friday night:   the film was long and dull, the acting was superb.

A review has one or two clauses, each with one or two adjectives. Of two adjectives the first is plain and the second
vivid ("good and lovely", never "lovely and good"). How good a review is, is defined in `oracle`, which only evaluation
and annotators import.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Sequence

ASPECTS = {"film": "acting", "book": "plot", "meal": "soup", "hotel": "room", "game": "music"}
"""The five topics, each with the one aspect that its reviews may mention."""
POSITIVE = ("good", "great", "lovely", "superb")
NEGATIVE = ("bad", "poor", "awful", "dull")
NEUTRAL = ("long", "short", "new", "old")
PLAIN = POSITIVE[:2] + NEGATIVE[:2] + NEUTRAL[:2]
VIVID = POSITIVE[2:] + NEGATIVE[2:] + NEUTRAL[2:]
MOODS = (POSITIVE, NEGATIVE, NEUTRAL)
CONJUNCTIONS = ("and", "but")
PEOPLE = ("i", "we", "they", "you")
DAYS = ("monday", "tuesday", "friday", "sunday")
TIMES = ("morning", "evening", "night")
PUNCTUATION = (",", ".", ":")
_LISTS = (ASPECTS, ASPECTS.values(), PLAIN, VIVID, CONJUNCTIONS, PEOPLE, DAYS, TIMES, ("the", "was", "tried", "on"))
WORDS = tuple(sorted(word for words in _LISTS for word in words))

_PROMPT = re.compile(rf"tried the (?:{'|'.join(NEUTRAL)}) ({'|'.join(ASPECTS)}) on ")


def all_prompts() -> list[str]:
    """Return every prompt of the grammar: 4 people x 4 neutral adjectives x 5 topics x 4 days x 3 times = 960."""
    choices = itertools.product(PEOPLE, NEUTRAL, ASPECTS, DAYS, TIMES)
    return [f"{who} tried the {kind} {topic} on {day} {time}:" for who, kind, topic, day, time in choices]


def topic_of(prompt: str) -> str | None:
    """Return the topic that a prompt names, or None if the prompt is not from this grammar."""
    match = _PROMPT.search(prompt)
    return match.group(1) if match else None


def sample_review(topic: str, choice: random.Random) -> str:
    """Draw a review of the topic. It has one of three moods, which most of its adjectives follow."""
    mood = choice.choice(MOODS)
    subjects = [topic, ASPECTS[topic]] if choice.random() < 3 / 4 else [topic]
    return ", ".join(f"the {subject} was {_sample_adjectives(mood, choice)}" for subject in subjects) + "."


def _sample_adjectives(mood: Sequence[str], choice: random.Random) -> str:
    if choice.random() < 1 / 4:
        return _sample_adjective(PLAIN + VIVID, mood, choice)
    first, second = (_sample_adjective(words, mood, choice) for words in (PLAIN, VIVID))
    return f"{first} {choice.choice(CONJUNCTIONS)} {second}"


def _sample_adjective(words: Sequence[str], mood: Sequence[str], choice: random.Random) -> str:
    follows = choice.random() < 2 / 3
    return choice.choice([word for word in words if word in mood] if follows else words)
