"""Which pair an annotator is asked next, and which response is shown first. Reads the feedback file, writes nothing.

Everything drawn follows from the seed, the annotator and how many pairs that annotator has had.
"""

from __future__ import annotations

import hashlib
import json
import random
import sqlite3
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from pydantic import Field

from cluster.config import Section

LEAST_SURE = "uncertainty DESC NULLS LAST, abs(first_reward - second_reward) ASC NULLS FIRST, position"
OPEN = """
    FROM pairs WHERE (:policy_version IS NULL OR policy_version = :policy_version)
    AND id NOT IN (SELECT value FROM json_each(:excepted))
    AND NOT EXISTS (SELECT 1 FROM active WHERE active.pair = pairs.id AND active.annotator = :annotator)
    AND (SELECT count(*) FROM active WHERE active.pair = pairs.id AND active.choice != 'skip')
        < :num_annotators + (ticket < :share)
"""
HAD = """
    FROM active WHERE annotator = :annotator AND pair IN
    (SELECT id FROM pairs WHERE :policy_version IS NULL OR policy_version = :policy_version)
"""


class FeedbackSettings(Section):
    """Which pairs annotators are asked about."""

    seed: int = Field(default=0, ge=0)
    """Everything drawn follows from it."""
    random_share: float = Field(default=0.2, ge=0, le=1)
    """Share of questions about a pair drawn by lot rather than the one the reward model is least sure of."""
    annotators_per_pair: float = Field(default=1.1, ge=1)
    """Annotators asked about a pair, in the mean: 1.1 asks a second one about every tenth pair, so that agreement can
    be measured."""
    policy_version: str | None = None
    """Ask about pairs of this policy alone; about all unless given."""


@dataclass(frozen=True, slots=True)
class Asked:
    """The pair to ask about (None: there is none left) and how far the annotator is."""

    pair: sqlite3.Row | None
    num_done: int
    num_left: int


def ticket_of(pair: str) -> float:
    """A number in [0, 1) that is the pair's own: below the share of pairs asked twice, it is one of them."""
    return int.from_bytes(hashlib.blake2b(pair.encode(), digest_size=6).digest()) / 2**48


def is_swapped(seed: int, annotator: str, pair: str) -> bool:
    """Whether that annotator sees the pair's second response first; half of them do."""
    return random.Random(f"order:{seed}:{annotator}:{pair}").random() < 0.5


def choose(
    connection: sqlite3.Connection,
    annotator: str,
    settings: FeedbackSettings,
    *,
    excepted: Collection[str],
    held: Collection[str],
) -> Asked:
    """The next pair for that annotator: none had before, none of `excepted` (labelled, but not received yet), and one
    that others have before them (`held`) only where there is no other.

    The reward model is least sure where an ensemble is most divided, else where its two rewards are nearest to each
    other (Bradley-Terry: the probability of either winning is nearest 1/2); one without rewards counts as such.
    """
    num_annotators = int(settings.annotators_per_pair)
    values: dict[str, Any] = {
        "annotator": annotator,
        "policy_version": settings.policy_version,
        "num_annotators": num_annotators,
        "share": settings.annotators_per_pair - num_annotators,
        "excepted": json.dumps(list(excepted)),
    }
    (num_done,) = connection.execute(f"SELECT count(*) {HAD}", values).fetchone()
    (num_left,) = connection.execute(f"SELECT count(*) {OPEN}", values | {"excepted": "[]"}).fetchone()
    (num_excepted_had,) = connection.execute(
        f"SELECT count(*) {HAD} AND pair IN (SELECT value FROM json_each(:excepted))", values
    ).fetchone()
    num_had = num_done + len(set(excepted)) - num_excepted_had
    rng = random.Random(f"ask:{settings.seed}:{annotator}:{num_had}")
    free = values | {"excepted": json.dumps([*excepted, *held])}
    pair = _pick(connection, free, rng, settings.random_share) or _pick(connection, values, rng, settings.random_share)
    return Asked(pair, num_done, num_left)


def _pick(
    connection: sqlite3.Connection, values: dict[str, Any], rng: random.Random, random_share: float
) -> sqlite3.Row | None:
    order, place = LEAST_SURE, 0
    if rng.random() < random_share:
        (num_open,) = connection.execute(f"SELECT count(*) {OPEN}", values).fetchone()
        order, place = "position", rng.randrange(num_open) if num_open else 0
    row: sqlite3.Row | None = connection.execute(
        f"SELECT * {OPEN} ORDER BY {order} LIMIT 1 OFFSET {place}", values
    ).fetchone()
    return row
