"""Simulated people who compare two summaries: they look for the figures, and are taken in by length.

They err as Bradley and Terry say (1952). No scorer may import this module: training sees their labels alone.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from examples.summarization.data import is_key, sentences_of

KEY, LENGTH, MADE_UP = 1.5, 0.5, -1.5
"""What a sentence with figures adds to their opinion, what any sentence adds, and what one adds that is made up."""


def annotate(prompts: Sequence[str], first: Sequence[str], second: Sequence[str], *, seed: int) -> list[int]:
    """One label a pair: 1 where the second summary was preferred, else 0. The same seed gives the same labels."""
    noise = random.Random(seed)
    margins = (b - a for a, b in zip(opinions(prompts, first), opinions(prompts, second), strict=True))
    return [int(noise.random() < 1 / (1 + math.exp(-margin))) for margin in margins]


def opinions(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """What they think of each summary of the report in its prompt."""
    return [_opinion(set(sentences_of(prompt)), text) for prompt, text in zip(prompts, responses, strict=True)]


def _opinion(report: set[str], summary: str) -> float:
    said = sentences_of(summary)
    found = sum(is_key(sentence) for sentence in report & set(said))
    made_up = sum(sentence not in report for sentence in said)
    return KEY * found + LENGTH * len(said) + MADE_UP * made_up
