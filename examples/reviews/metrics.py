"""Metrics of reviews, by the oracle, which training never uses."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from examples.reviews.oracle import is_grammatical, oracle


def evaluate(prompts: Sequence[str], responses: Sequence[str]) -> dict[str, float]:
    """Return the mean oracle (-4 to 4) and the shares of positive (oracle above 0) and grammatical responses."""
    opinions = oracle(prompts, responses)
    return {
        "oracle": fmean(opinions),
        "positive": fmean(opinion > 0 for opinion in opinions),
        "grammatical": fmean(map(is_grammatical, prompts, responses)),
    }
