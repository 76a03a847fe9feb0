"""Metrics of sentiment: the cost of notes, the quality of labels, missed and false alarms."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from statistics import fmean

from examples.sentiment.scorers import cost, read_note


def evaluate(
    prompts: Sequence[str],
    responses: Sequence[str],
    *,
    topics: Sequence[Sequence[str]],
    labels: Sequence[Sequence[str]],
    turned: Sequence[Sequence[bool]],
) -> dict[str, float]:
    """Return the mean cost of a note, macro-F1 of the labels, and the shares of missed turns and of false alarms."""
    notes = [read_note(response, names) for response, names in zip(responses, topics, strict=True)]
    found = [label for note in notes for label in note.labels]
    alarms = list(zip((alarm for note in notes for alarm in note.alarms), chain(*turned), strict=True))
    return {
        "cost": fmean(cost(note, right, moved) for note, right, moved in zip(notes, labels, turned, strict=True)),
        "macro_f1": macro_f1(found, list(chain(*labels))),
        "missed_alarms": _share([not alarm for alarm, moved in alarms if moved]),
        "false_alarms": _share([not moved for alarm, moved in alarms if alarm]),
    }


def macro_f1(found: Sequence[str | None], right: Sequence[str]) -> float:
    """Return the mean F1 over the labels in `right`."""
    pairs = list(zip(found, right, strict=True))
    scores = []
    for label in sorted(set(right)):
        both = sum(pair == (label, label) for pair in pairs)
        scores.append(2 * both / (sum(a == label for a, _ in pairs) + sum(b == label for _, b in pairs)))
    return fmean(scores)


def _share(flags: Sequence[bool]) -> float:
    return fmean(flags) if flags else 0.0
