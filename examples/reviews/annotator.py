"""Simulated annotators: they prefer what the oracle prefers, and err the more often the closer two responses are.

Bradley and Terry's model (1952): the second response wins with probability sigmoid(oracle(second) - oracle(first)).
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from examples.reviews.oracle import oracle


def annotate(prompts: Sequence[str], first: Sequence[str], second: Sequence[str], *, seed: int) -> list[int]:
    """One label a pair: 1 where the second response was preferred, else 0. The same seed gives the same labels."""
    noise = random.Random(seed)
    margins = (b - a for a, b in zip(oracle(prompts, first), oracle(prompts, second), strict=True))
    return [int(noise.random() < 1 / (1 + math.exp(-margin))) for margin in margins]
