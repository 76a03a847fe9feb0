"""Simulate annotators that prefer what the oracle prefers, and err more often if two responses are close.

Bradley and Terry's model (1952): the second response wins with probability sigmoid(oracle(second) - oracle(first)).
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from examples.reviews.oracle import oracle


def annotate(prompts: Sequence[str], first: Sequence[str], second: Sequence[str], *, seed: int) -> list[int]:
    """Return one label per pair: 1 if the second response was preferred, else 0. Equal seeds give equal labels."""
    noise = random.Random(seed)
    margins = (b - a for a, b in zip(oracle(prompts, first), oracle(prompts, second), strict=True))
    return [int(noise.random() < 1 / (1 + math.exp(-margin))) for margin in margins]
