"""The reward of a ranking: simulated clicks on the first five places, the lower ones seen by fewer, on sixteen visits.

Whether a user clicks follows from chance, but the same ranking for the same user always gets the same clicks. A list
breaks off where it has something twice, or that is not on offer.
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
"""How often a ranking is shown to its user."""
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
            discount * _clicks(chance, "\n".join((prompt, response, item)))
            for discount, chance, item in zip(DISCOUNTS, chances_of(ranked, items, chances), ranked, strict=False)
        )
        / (NUM_VISITS * sum(DISCOUNTS))
        for prompt, response, items, chances in rows
        for ranked in [_shown(ranked_items(response), items)]
    ]


def ranked_items(response: str) -> list[str]:
    """What a response puts in each place: its items, parted by commas, line ends or numbers, in lower case."""
    parts = re.split(r"[,;\n]|\d+[.)]", response.casefold())
    return [name for part in parts if (name := part.strip(" .!?*-\t\r"))]


def chances_of(ranked: Sequence[str], offered: Sequence[str], chances: Sequence[float]) -> list[float]:
    """How likely a click is in each place; what was not on offer, or is there already, gets none."""
    left = {item.casefold(): chance for item, chance in zip(offered, chances, strict=True)}
    return [left.pop(item, 0.0) for item in ranked]


def _shown(ranked: Sequence[str], offered: Sequence[str]) -> list[str]:
    """The places of a list before the first one that is not on offer, or is there already."""
    left, shown = {item.casefold() for item in offered}, list[str]()
    for item in ranked:
        if item not in left:
            break
        left.remove(item)
        shown.append(item)
    return shown


def _clicks(chance: float, what: str) -> int:
    """On how many visits that is clicked."""
    draws = hashlib.blake2b(what.encode(), digest_size=4 * NUM_VISITS).digest()
    return sum(draw < chance * 2**32 for (draw,) in struct.iter_unpack("<I", draws))
