"""Reward of a ranking: simulated clicks on the first five places in sixteen visits, discounted by place.

Clicks are random, but the same ranking for the same user always gets the same clicks. A list counts only up to its
first item that is repeated or not offered.
"""

from __future__ import annotations

import hashlib
import math
import re
import struct
from collections.abc import Sequence
from typing import Any

NUM_PLACES = 5
NUM_VISITS = 16
"""Number of times that a ranking is shown to its user."""
DISCOUNTS = tuple(1 / math.log2(place + 2) for place in range(NUM_PLACES))


def click_reward(
    prompts: Sequence[str],
    responses: Sequence[str],
    *,
    offered: Sequence[Sequence[str]],
    click_chances: Sequence[Sequence[float]],
    **columns: Any,
) -> list[float]:
    """Return one reward per response, 0 to 1: discounted clicks over the discounted sum of all possible clicks."""
    rows = zip(prompts, responses, offered, click_chances, strict=True)
    return [
        sum(
            discount * _clicks(chance, "\n".join((prompt, response, item)))
            for discount, chance, item in zip(DISCOUNTS, chances_of(ranked, items, chances), ranked, strict=False)
        )
        / (NUM_VISITS * sum(DISCOUNTS))
        for prompt, response, items, chances in rows
        for ranked in [_shown(ranked_items(response), items)]
    ]


def ranked_items(response: str) -> list[str]:
    """Return the items of a response in lower case, split at commas, semicolons, line ends and list numbers."""
    parts = re.split(r"[,;\n]|\d+[.)]", response.casefold())
    return [name for part in parts if (name := part.strip(" .!?*-\t\r"))]


def chances_of(ranked: Sequence[str], offered: Sequence[str], chances: Sequence[float]) -> list[float]:
    """Return the chance of a click in each place; 0 for an item that is repeated or was not offered."""
    left = {item.casefold(): chance for item, chance in zip(offered, chances, strict=True)}
    return [left.pop(item, 0.0) for item in ranked]


def _shown(ranked: Sequence[str], offered: Sequence[str]) -> list[str]:
    """Return the items before the first one that is repeated or not offered."""
    left, shown = {item.casefold() for item in offered}, list[str]()
    for item in ranked:
        if item not in left:
            break
        left.remove(item)
        shown.append(item)
    return shown


def _clicks(chance: float, text: str) -> int:
    """Return the number of visits with a click; the draws are a hash of `text`."""
    draws = hashlib.blake2b(text.encode(), digest_size=4 * NUM_VISITS).digest()
    return sum(draw < chance * 2**32 for (draw,) in struct.iter_unpack("<I", draws))
