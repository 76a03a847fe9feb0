"""What a note costs: an alarm that is missing costs five times one too many, or a label that is wrong.

A note says `TOPIC LABEL` or `TOPIC LABEL alarm` of each topic, parted by commas, semicolons, full stops or line ends.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

MISSED_ALARM, FALSE_ALARM, WRONG_LABEL = 5.0, 1.0, 1.0
LABELS = ("positive", "negative", "neutral")
SCALE = 5.0
"""What costs are divided by for a reward."""


class Note(NamedTuple):
    """What a note says of each topic: its label (None where it says none) and whether it alarms."""

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
    """One reward a response: minus its cost, scaled."""
    rows = zip(responses, topics, labels, turned, strict=True)
    return [-cost(read_note(response, names), right, moved) / SCALE for response, names, right, moved in rows]


def read_note(response: str, topics: Sequence[str]) -> Note:
    """What a response says of these topics: what is said first of each counts, and one label alone."""
    parts = [re.findall(r"\w+", part) for part in re.split(r"[,;.\n]", response.casefold())]
    labels, alarms = [], []
    for topic in topics:
        words = next((part for part in parts if topic.casefold() in part), [])
        found = set(LABELS) & set(words)
        labels.append(found.pop() if len(found) == 1 else None)
        alarms.append("alarm" in words and not {"no", "not", "without"} & set(words))
    return Note(labels, alarms)


def cost(note: Note, labels: Sequence[str], turned: Sequence[bool]) -> float:
    """What the note costs: missed and false alarms, and labels that are wrong or missing."""
    alarms = zip(note.alarms, turned, strict=True)
    price = {(False, True): MISSED_ALARM, (True, False): FALSE_ALARM}
    wrong = sum(said != right for said, right in zip(note.labels, labels, strict=True))
    return sum(price.get(alarm, 0.0) for alarm in alarms) + WRONG_LABEL * wrong
