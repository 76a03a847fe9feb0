"""How good responses of the reviews task are, by the oracle that training never sees."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from examples.reviews.oracle import is_grammatical, oracle


def evaluate(prompts: Sequence[str], responses: Sequence[str]) -> dict[str, float]:
    """Mean oracle (-4 to 4), and the shares of responses that are positive (oracle above 0) and grammatical."""
    opinions = oracle(prompts, responses)
    return {
        "oracle": fmean(opinions),
        "positive": fmean(opinion > 0 for opinion in opinions),
        "grammatical": fmean(map(is_grammatical, prompts, responses)),
    }
