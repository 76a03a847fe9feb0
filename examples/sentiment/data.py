"""Make the data of sentiment: headlines of markets, their trends before, and notes of analysts who alarm too rarely.

    before: oil up, wool down, tin up. news: oil slumps, wool steadies, tin soars.
    oil negative alarm, wool neutral, tin positive.

A market has turned if it was up and its news is negative.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from examples.conversations import Row, distinct, write_data

TOPICS = ("oil", "wool", "tin", "grain", "gold", "cotton")
LABELS = ("positive", "negative", "neutral")
NEWS = {
    "positive": ("soars", "climbs", "rallies", "recovers", "surges", "gains"),
    "negative": ("slumps", "tumbles", "sinks", "crashes", "slides", "drops"),
    "neutral": ("steadies", "idles", "hovers", "waits", "pauses", "drifts"),
}
BEFORE = ("up", "down")
NUM_TOPICS = 3
WORDS = (
    *TOPICS,
    *LABELS,
    *BEFORE,
    *(word for words in NEWS.values() for word in words),
    *("before", "news", "alarm"),
)

WRONG_LABELS, MISSED_ALARMS, FALSE_ALARMS = 0.12, 0.4, 0.04
"""Error rates of the analysts: in labels, in alarms for markets that turned, and in alarms for markets that did not."""
NUM_DEMONSTRATIONS, NUM_TRAINING, NUM_HELD_OUT = 8000, 4000, 512


@dataclass(frozen=True, slots=True)
class Day:
    """The markets of a day, with each one's trend before, its news and the label of the news."""

    topics: tuple[str, ...]
    before: tuple[str, ...]
    news: tuple[str, ...]
    labels: tuple[str, ...]

    @property
    def prompt(self) -> str:
        before, news = (_listed(zip(self.topics, words, strict=True)) for words in (self.before, self.news))
        return f"before: {before}. news: {news}."

    @property
    def turned(self) -> list[bool]:
        """Return whether each market has turned."""
        return [was == "up" and label == "negative" for was, label in zip(self.before, self.labels, strict=True)]


def _listed(pairs: Iterable[tuple[str, str]]) -> str:
    return ", ".join(map(" ".join, pairs))


def build_data(directory: Path, *, seed: int) -> None:
    """Write the SFT corpus, training days and held-out days. All days are different."""
    choice = random.Random(seed)
    days = distinct(
        lambda: sample_day(choice), NUM_DEMONSTRATIONS + NUM_TRAINING + NUM_HELD_OUT, lambda day: day.prompt
    )
    rows = [row(day) for day in days[: NUM_HELD_OUT + NUM_TRAINING]]
    demonstrated = days[NUM_HELD_OUT + NUM_TRAINING :]
    write_data(
        directory,
        demonstrations=[(day.prompt, note(day, choice)) for day in demonstrated],
        training=rows[NUM_HELD_OUT:],
        held_out=rows[:NUM_HELD_OUT],
    )


def row(day: Day) -> Row:
    """Return the columns that a scorer gets: the topics, and for each its label and whether it turned."""
    return {"prompt": day.prompt, "topics": day.topics, "labels": day.labels, "turned": day.turned}


def sample_day(choice: random.Random) -> Day:
    """Draw a day."""
    labels = choice.choices(LABELS, k=NUM_TOPICS)
    news = [choice.choice(NEWS[label]) for label in labels]
    before = choice.choices(BEFORE, k=NUM_TOPICS)
    return Day(tuple(choice.sample(TOPICS, NUM_TOPICS)), tuple(before), tuple(news), tuple(labels))


def note(day: Day, choice: random.Random) -> str:
    """Return the note of an analyst who errs in labels and alarms."""
    parts = []
    for topic, right, has_turned in zip(day.topics, day.labels, day.turned, strict=True):
        label = _other(right, choice) if choice.random() < WRONG_LABELS else right
        is_alarmed = choice.random() < (1 - MISSED_ALARMS if has_turned else FALSE_ALARMS)
        parts.append(f"{topic} {label}{' alarm' if is_alarmed else ''}")
    return f"{', '.join(parts)}."


def _other(label: str, choice: random.Random) -> str:
    return choice.choice([each for each in LABELS if each != label])
