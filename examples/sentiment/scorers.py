"""What a note costs: an alarm that is missing costs five times one too many, or a label that is wrong.

A note says `TOPIC LABEL` for each topic, and names the topics that turned after the word "alarm".
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

MISSED_ALARM, FALSE_ALARM, WRONG_LABEL = 5.0, 1.0, 1.0
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
    """What a response says of these topics; of two labels for one the first counts, one that can't be told is none."""
    labels_part, _, alarms_part = re.sub(r"\bno alarms?\b", "", response.casefold()).partition("alarm")
    labels = []
    for topic in topics:
        found = re.search(rf"\b{re.escape(topic.casefold())}\b\W*(?:is\s+)?(positive|negative|neutral)\b", labels_part)
        labels.append(found.group(1) if found else None)
    alarms = [re.search(rf"\b{re.escape(topic.casefold())}\b", alarms_part) is not None for topic in topics]
    return Note(labels, alarms)


def cost(note: Note, labels: Sequence[str], turned: Sequence[bool]) -> float:
    """What the note costs: missed and false alarms, and labels that are wrong or missing."""
    alarms = zip(note.alarms, turned, strict=True)
    price = {(False, True): MISSED_ALARM, (True, False): FALSE_ALARM}
    wrong = sum(said != right for said, right in zip(note.labels, labels, strict=True))
    return sum(price.get(alarm, 0.0) for alarm in alarms) + WRONG_LABEL * wrong
