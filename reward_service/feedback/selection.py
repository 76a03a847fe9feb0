"""Selects the next pair for an annotator, and the order of its responses.

Only reads the feedback file.

Random choices depend only on the seed, the annotator and how many pairs the annotator has had.
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
    """Seed of all random choices."""
    random_share: float = Field(default=0.2, ge=0, le=1)
    """Share of questions about a random pair instead of the one on which the reward model is least sure."""
    annotators_per_pair: float = Field(default=1.1, ge=1)
    """Mean number of annotators per pair: 1.1 asks a second annotator about every tenth pair, to measure agreement."""
    policy_version: str | None = None
    """Ask about pairs of this policy only; about all pairs if unset."""


@dataclass(frozen=True, slots=True)
class Asked:
    """The pair to ask about (None if none is left) and the annotator's progress."""

    pair: sqlite3.Row | None
    num_done: int
    num_left: int


def ticket_of(pair: str) -> float:
    """Return the pair's pseudo-random number in [0, 1): a pair below the repeated share is asked twice."""
    return int.from_bytes(hashlib.blake2b(pair.encode(), digest_size=6).digest()) / 2**48


def is_swapped(seed: int, annotator: str, pair: str) -> bool:
    """Return whether the annotator sees the second response first; half of the annotators do."""
    return random.Random(f"order:{seed}:{annotator}:{pair}").random() < 0.5


def choose(
    connection: sqlite3.Connection,
    annotator: str,
    settings: FeedbackSettings,
    *,
    excepted: Collection[str],
    held: Collection[str],
) -> Asked:
    """Select the annotator's next pair: not asked before, and not `excepted` (label in transit).

    Pairs that other annotators currently see (`held`) are selected only if there is no other. Usually the pair is the
    one on which the reward model is least sure: where an ensemble disagrees most, else where its two rewards are
    closest (Bradley-Terry: the probability that either wins is nearest to 1/2). Pairs without rewards come first.
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
    order, offset = LEAST_SURE, 0
    if rng.random() < random_share:
        (num_open,) = connection.execute(f"SELECT count(*) {OPEN}", values).fetchone()
        order, offset = "position", rng.randrange(num_open) if num_open else 0
    row: sqlite3.Row | None = connection.execute(
        f"SELECT * {OPEN} ORDER BY {order} LIMIT 1 OFFSET {offset}", values
    ).fetchone()
    return row
