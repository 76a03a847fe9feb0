"""Reward of a note, from its cost: a missed alarm costs five times as much as a false alarm or a wrong label.

A note has `TOPIC LABEL` or `TOPIC LABEL alarm` for each topic, separated by commas, semicolons, periods or line ends.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

MISSED_ALARM, FALSE_ALARM, WRONG_LABEL = 5.0, 1.0, 1.0
LABELS = ("positive", "negative", "neutral")
SCALE = 5.0
"""Costs are divided by this for the reward."""


class Note(NamedTuple):
    """Content of a note by topic: the label (None if there is none) and whether there is an alarm."""

    labels: list[str | None]
    alarms: list[bool]


def note_reward(
    prompts: Sequence[str],
    responses: Sequence[str],
    *,
    topics: Sequence[Sequence[str]],
    labels: Sequence[Sequence[str]],
    turned: Sequence[Sequence[bool]],
    **columns: Any,
) -> list[float]:
    """Return one reward per response: minus its cost, over SCALE."""
    rows = zip(responses, topics, labels, turned, strict=True)
    return [-cost(read_note(response, names), right, moved) / SCALE for response, names, right, moved in rows]


def read_note(response: str, topics: Sequence[str]) -> Note:
    """Parse a response. The first part about each topic counts; its label is None unless the part has exactly one."""
    parts = [re.findall(r"\w+", part) for part in re.split(r"[,;.\n]", response.casefold())]
    labels, alarms = [], []
    for topic in topics:
        words = next((part for part in parts if topic.casefold() in part), [])
        found = set(LABELS) & set(words)
        labels.append(found.pop() if len(found) == 1 else None)
        alarms.append("alarm" in words and not {"no", "not", "without"} & set(words))
    return Note(labels, alarms)


def cost(note: Note, labels: Sequence[str], turned: Sequence[bool]) -> float:
    """Return the cost of a note: missed and false alarms, and wrong or missing labels."""
    alarms = zip(note.alarms, turned, strict=True)
    price = {(False, True): MISSED_ALARM, (True, False): FALSE_ALARM}
    wrong = sum(label != right for label, right in zip(note.labels, labels, strict=True))
    return sum(price.get(alarm, 0.0) for alarm in alarms) + WRONG_LABEL * wrong
