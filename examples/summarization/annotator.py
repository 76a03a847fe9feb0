"""Simulate annotators that compare two summaries: they look for figures, and prefer length.

They err by Bradley and Terry's model (1952). No scorer may import this module: training gets only their labels.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from examples.summarization.data import is_key, sentences_of

KEY, LENGTH, MADE_UP = 1.5, 0.5, -1.5
"""What a sentence with figures, any sentence, and a sentence that is not in the report add to the score."""


def annotate(prompts: Sequence[str], first: Sequence[str], second: Sequence[str], *, seed: int) -> list[int]:
    """Return one label per pair: 1 if the second summary was preferred, else 0. Equal seeds give equal labels."""
    noise = random.Random(seed)
    margins = (b - a for a, b in zip(opinions(prompts, first), opinions(prompts, second), strict=True))
    return [int(noise.random() < 1 / (1 + math.exp(-margin))) for margin in margins]


def opinions(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """Return the annotators' score of each summary of the report in its prompt."""
    return [_opinion(set(sentences_of(prompt)), text) for prompt, text in zip(prompts, responses, strict=True)]


def _opinion(report: set[str], summary: str) -> float:
    sentences = sentences_of(summary)
    found = sum(is_key(sentence) for sentence in report & set(sentences))
    made_up = sum(sentence not in report for sentence in sentences)
    return KEY * found + LENGTH * len(sentences) + MADE_UP * made_up
