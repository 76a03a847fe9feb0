"""The reward of a ranking: simulated clicks on the first five places, the lower ones seen by fewer.

Whether a user clicks follows from chance, but the same ranking for the same user always gets the same clicks.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Sequence
from typing import Any

NUM_PLACES = 5
DISCOUNTS = tuple(1 / math.log2(place + 2) for place in range(NUM_PLACES))


def click_reward(
    prompts: Sequence[str],
    responses: Sequence[str],
    *,
    offered: Sequence[Sequence[str]],
    click_chances: Sequence[Sequence[float]],
    **columns: Any,
) -> list[float]:
    """One reward a response, 0 to 1: discounted clicks over those that every place would give."""
    rows = zip(prompts, responses, offered, click_chances, strict=True)
    return [
        sum(
            discount
            for discount, chance, item in zip(DISCOUNTS, chances_of(ranked, items, chances), ranked, strict=False)
            if _draw(prompt, response, item) < chance
        )
        / sum(DISCOUNTS)
        for prompt, response, items, chances in rows
        for ranked in [ranked_items(response)]
    ]


def ranked_items(response: str) -> list[str]:
    """What a response puts in each place: its items, parted by commas, line ends or numbers, in lower case."""
    parts = re.split(r"[,;\n]|\d+[.)]", response.casefold())
    return [name for part in parts if (name := part.strip(" .!?*-\t\r"))]


def chances_of(ranked: Sequence[str], offered: Sequence[str], chances: Sequence[float]) -> list[float]:
    """How likely a click is in each place; what was not on offer, or is there already, gets none."""
    left = {item.casefold(): chance for item, chance in zip(offered, chances, strict=True)}
    return [left.pop(item, 0.0) for item in ranked]


def _draw(prompt: str, response: str, item: str) -> float:
    return zlib.crc32("\n".join((prompt, response, item)).encode()) / 2**32
