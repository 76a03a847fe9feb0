"""Make the data of recommendation: users and items with hidden factors, and demonstrations from an old shop's lists.

A user likes an item more if their hidden factors agree and if the item is popular. A prompt lists what the user liked
and what is offered. The demonstrations are lists that a shop showed: ranked by popularity, partly by taste, by chance.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from examples.conversations import Row, distinct, write_data

ITEMS = (
    *("atlas", "ballads", "chess", "dunes", "embers", "falcons", "gardens", "harbors", "islands", "jungles", "knots"),
    *("lanterns", "mosaics", "nebulas", "orchards", "planets", "quilts", "rivers", "sailing", "tides", "umbrellas"),
    *("volcanoes", "whales", "zithers"),
)
WORDS = (*ITEMS, "liked", "rank")
NUM_FACTORS, NUM_LIKED, NUM_OFFERED, NUM_RANKED = 2, 4, 8, 5
TASTE, POPULARITY = 2.5, 0.5
"""Weight of the agreement of factors, and standard deviation of popularity, in the appeal of an item."""
SHOP_TASTE, SHOP_CHANCE = 0.5, 1.0
"""Share of a user's taste that the old shop knew, and weight of chance in its lists."""
NUM_DEMONSTRATIONS, NUM_TRAINING, NUM_HELD_OUT = 8000, 4000, 512


@dataclass(frozen=True, slots=True)
class Item:
    """Hidden factors of an item (a unit vector), and its popularity with all users."""

    factors: tuple[float, ...]
    popularity: float


@dataclass(frozen=True, slots=True)
class Visit:
    """A user's hidden factors, the items they liked before, and the items offered."""

    user: tuple[float, ...]
    liked: tuple[str, ...]
    offered: tuple[str, ...]

    @property
    def prompt(self) -> str:
        return f"liked: {', '.join(self.liked)}. rank: {', '.join(self.offered)}."


def _world() -> dict[str, Item]:
    """Return the items, which do not depend on the run's seed."""
    choice = random.Random(len(ITEMS))
    return {name: Item(_direction(choice), choice.gauss(0, POPULARITY)) for name in ITEMS}


def _direction(choice: random.Random) -> tuple[float, ...]:
    values = [choice.gauss(0, 1) for _ in range(NUM_FACTORS)]
    length = math.hypot(*values)
    return tuple(value / length for value in values)


WORLD = _world()


def build_data(directory: Path, *, seed: int) -> None:
    """Write the SFT corpus, training visits and held-out visits. All users are different."""
    choice = random.Random(seed)
    num = NUM_DEMONSTRATIONS + NUM_TRAINING + NUM_HELD_OUT
    visits = distinct(lambda: sample_visit(choice), num, lambda visit: visit.prompt)
    rows = [row(visit) for visit in visits[: NUM_HELD_OUT + NUM_TRAINING]]
    demonstrated = visits[NUM_HELD_OUT + NUM_TRAINING :]
    write_data(
        directory,
        demonstrations=[(visit.prompt, shop_list(visit, choice)) for visit in demonstrated],
        training=rows[NUM_HELD_OUT:],
        held_out=rows[:NUM_HELD_OUT],
    )


def row(visit: Visit) -> Row:
    """Return the columns that a scorer gets: the offered items, and each one's chance of a click and popularity."""
    clicks = [click_chance(visit.user, item) for item in visit.offered]
    popularity = [WORLD[item].popularity for item in visit.offered]
    columns: dict[str, Any] = {"offered": visit.offered, "click_chances": clicks, "popularity": popularity}
    return {"prompt": visit.prompt, **columns}


def sample_visit(choice: random.Random) -> Visit:
    """Draw a user with the items they clicked on before and the items offered."""
    user = _direction(choice)
    seen = choice.sample(ITEMS, len(ITEMS))
    liked = [item for item in seen if choice.random() < click_chance(user, item)][:NUM_LIKED]
    while len(liked) < NUM_LIKED:
        liked.append(max((i for i in seen if i not in liked), key=lambda item: click_chance(user, item)))
    offered = choice.sample([item for item in ITEMS if item not in liked], NUM_OFFERED)
    return Visit(user, tuple(liked), tuple(offered))


def click_chance(user: Sequence[float], name: str) -> float:
    """Return the probability that the user clicks on the item when they see it."""
    return 1 / (1 + math.exp(1 - TASTE * _agreement(user, name) - WORLD[name].popularity))


def _agreement(user: Sequence[float], name: str) -> float:
    return sum(a * b for a, b in zip(user, WORLD[name].factors, strict=True))


def shop_list(visit: Visit, choice: random.Random) -> str:
    """Return the list that the old shop showed the user."""

    def worth(item: str) -> float:
        chance = -math.log(-math.log(choice.random()))
        taste = SHOP_TASTE * TASTE * _agreement(visit.user, item)
        return WORLD[item].popularity + taste + SHOP_CHANCE * chance

    return f"{', '.join(sorted(visit.offered, key=worth, reverse=True)[:NUM_RANKED])}."
