"""Decide which records are new, which repeat an earlier call, and which are refused.

A trajectory's records come as TOKENS 0, 1, ..., SCORE, TRAIN within its group's ADMIT and VOID. A record that is there
already changes nothing, whichever actor sends it; a new one from an actor declared dead is refused; one that comes
before the record it builds on is an internal error. Keeps open groups only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from cluster.errors import RecorderError, TrajectoryRefused
from cluster.journal.events import Record, actor_name

COLUMNS = ("kind", "incarnation", "version", "group", "uid", "segment", "actor", "generation")
"""Columns that determine the order."""


@dataclass(slots=True)
class _Group:
    """An admitted group: how many segments each of its trajectories has, and which are scored, and trained."""

    num_segments: dict[str, int] = field(default_factory=dict)
    scored: set[str] = field(default_factory=set)
    trained: set[str] = field(default_factory=set)


class Sequencer:
    """The state of one log."""

    def __init__(self) -> None:
        self._started: str | None = None
        self._next_group = 0
        self._open: dict[int, _Group] = {}
        self._fenced: dict[str, int] = {}
        self._published: tuple[str, int] | None = None

    def require_alive(self, records: Sequence[Record]) -> None:
        """Raise TrajectoryRefused if one of these records is new and comes from an actor that was declared dead."""
        for record in records:
            if record["kind"] != "TOKENS" or record["generation"] > self._fenced.get(record["actor"], -1):
                continue
            group = self._open.get(record["group"])
            if group is not None and record["segment"] >= group.num_segments.get(record["uid"], 0):
                sender = actor_name(record["actor"], record["generation"])
                raise TrajectoryRefused(record["uid"], f"{sender} was declared dead before it sent this")

    def accept(self, record: Record) -> bool:
        """Return whether the record is new, and accept it if so. Raises RecorderError if it comes too early."""
        accept = {
            "START": self._start,
            "ADMIT": self._admit,
            "TOKENS": self._tokens,
            "SCORE": self._score,
            "VOID": self._void,
            "TRAIN": self._train,
            "PUBLISH": self._publish,
            "FENCE": self._fence,
        }[record["kind"]]
        return accept(record)

    def _start(self, record: Record) -> bool:
        """Start a command: its actors reuse earlier names, open groups continue, later groups are admitted again."""
        if record["incarnation"] == self._started:
            return False
        self._started, self._next_group = record["incarnation"], record["group"]
        self._open = {number: group for number, group in self._open.items() if number < self._next_group}
        self._fenced, self._published = {}, None
        return True

    def _admit(self, record: Record) -> bool:
        number = record["group"]
        if number > self._next_group:
            raise RecorderError(f"group {number}", f"admitted before group {self._next_group}")
        if number < self._next_group:
            return False
        self._open[number] = _Group()
        self._next_group += 1
        return True

    def _group(self, record: Record) -> _Group | None:
        """Return the record's group, or None if it is closed."""
        number = record["group"]
        if number >= self._next_group:
            raise RecorderError(record["uid"], f"{record['kind']} before its group was admitted")
        return self._open.get(number)

    def _tokens(self, record: Record) -> bool:
        group, uid, segment = self._group(record), record["uid"], record["segment"]
        if group is None or segment < group.num_segments.get(uid, 0):
            return False
        if segment > group.num_segments.get(uid, 0) or uid in group.scored:
            raise RecorderError(uid, f"segment {segment} is out of order")
        group.num_segments[uid] = segment + 1
        return True

    def _score(self, record: Record) -> bool:
        group, uid = self._group(record), record["uid"]
        if group is None or uid in group.scored:
            return False
        if uid not in group.num_segments:
            raise RecorderError(uid, "scored before anything was sampled")
        group.scored.add(uid)
        return True

    def _void(self, record: Record) -> bool:
        return self._group(record) is not None and self._open.pop(record["group"]) is not None

    def _train(self, record: Record) -> bool:
        group, uid = self._group(record), record["uid"]
        if group is None or uid in group.trained:
            return False
        if uid not in group.scored:
            raise RecorderError(uid, "trained before it was scored")
        group.trained.add(uid)
        if len(group.trained) == len(group.num_segments):
            del self._open[record["group"]]
        return True

    def _publish(self, record: Record) -> bool:
        before, self._published = self._published, (record["incarnation"], record["version"])
        return self._published != before

    def _fence(self, record: Record) -> bool:
        if record["generation"] <= self._fenced.get(record["actor"], -1):
            return False
        self._fenced[record["actor"]] = record["generation"]
        return True
