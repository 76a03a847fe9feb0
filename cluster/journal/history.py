"""Read a run's journal: what happened, without the events that a later command repeated.

Counts the ledger, rebuilds the trajectories of each step as trained, and finds the point to resume from. Writes
nothing; keeps an index of the log in memory, not the samples.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import accumulate, groupby
from pathlib import Path

from cluster.errors import RecorderError
from cluster.journal.events import EQUAL_REWARDS, Record, to_partial, to_trajectory
from cluster.journal.files import ROWS_AT_ONCE, read_file, read_files
from cluster.ledger import PendingGroup, QueueCounts, ResumePoint
from cluster.trajectory import Trajectory

INDEX = ("kind", "group", "uid", "admission_index", "step", "position", "version", "num_steps", "settings", "reason")
"""Columns that are read for every record; the others are read only for requested trajectories."""
FILES_AT_ONCE = 2
"""Files of the log that are cached in memory."""


@dataclass(slots=True)
class _Rows:
    """Positions of a trajectory's records in the log."""

    group: int
    tokens: list[int]
    score: int | None = None


class History:
    """A log, read by the constructor. Raises RecorderError if it is damaged."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        files = read_files(folder, INDEX)
        self._names = list(files)
        self._starts = [0, *accumulate(map(len, files.values()))]
        self._file = lru_cache(FILES_AT_ONCE)(partial(read_file, folder))
        self._admitted: dict[int, int] = {}
        self._void: set[int] = set()
        self._resampled: set[int] = set()
        self._rows: dict[str, _Rows] = {}
        self._steps: dict[int, dict[int, str]] = defaultdict(dict)
        self._published: dict[int, int] = {}
        self._lengths: dict[int, int] = {}
        self._settings: dict[int, str] = {}
        batches = (batch for table in files.values() for batch in table.to_batches(max_chunksize=ROWS_AT_ONCE))
        for record in (record for batch in batches for record in batch.to_pylist()):
            self._take(record["number"], record)

    def _take(self, row: int, record: Record) -> None:
        match record["kind"]:
            case "START":
                self._rewind(record["version"], record["group"])
                if record["num_steps"] is not None:
                    self._lengths[record["version"]] = record["num_steps"]
                if record["settings"] is not None:
                    self._settings[record["version"]] = record["settings"]
            case "ADMIT":
                self._admitted[record["group"]] = record["admission_index"]
            case "TOKENS":
                self._rows.setdefault(record["uid"], _Rows(record["group"], [])).tokens.append(row)
            case "SCORE":
                self._rows[record["uid"]].score = row
            case "VOID":
                self._void.add(record["group"])
                if record["reason"] == EQUAL_REWARDS:
                    self._resampled.add(record["group"])
            case "TRAIN":
                self._steps[record["step"]][record["position"]] = record["uid"]
            case "PUBLISH":
                self._published[record["version"]] = row

    def _rewind(self, version: int, group: int) -> None:
        """Drop everything after `version` and from `group` on: the resumed command repeats it."""
        self._admitted = {number: index for number, index in self._admitted.items() if number < group}
        self._void = {number for number in self._void if number < group}
        self._resampled = {number for number in self._resampled if number < group}
        self._rows = {uid: rows for uid, rows in self._rows.items() if rows.group < group}
        for step in [step for step in self._steps if step > version]:
            del self._steps[step]
        self._published = {number: row for number, row in self._published.items() if number <= version}
        self._lengths = {after: num for after, num in self._lengths.items() if after < version}
        self._settings = {after: text for after, text in self._settings.items() if after < version}

    @property
    def steps(self) -> list[int]:
        """Return the trained steps."""
        return sorted(self._steps)

    @property
    def lengths(self) -> tuple[tuple[int, int], ...]:
        """Return pairs (version, number of steps of the run from there on); empty if an older log lacks them."""
        return tuple(sorted(self._lengths.items()))

    @property
    def settings(self) -> tuple[tuple[int, str], ...]:
        """Return pairs (version, JSON): the run's settings for the steps after that version, in order."""
        return tuple(sorted(self._settings.items()))

    def step_of(self, uid: str) -> int | None:
        """Return the step that trained a trajectory, or None."""
        return next((step for step, uids in self._steps.items() if uid in uids.values()), None)

    @property
    def versions(self) -> list[int]:
        """Return the published versions."""
        return sorted(self._published)

    def checksums(self, version: int) -> dict[str, str]:
        """Return each tensor's checksum of a version, as last published."""
        record = self._records([self._published[version]])[0]
        return dict(record["checksums"])

    def counts(self) -> QueueCounts:
        """Return the ledger, in groups: num_admitted = num_trained + num_void + num_open."""
        num_void, num_open, num_resampled = len(self._void), len(self._open()), len(self._resampled)
        return QueueCounts(len(self._admitted), len(self._trained()), num_void, num_open, num_resampled)

    def _trained(self) -> set[int]:
        return {self._rows[uid].group for step in self._steps.values() for uid in step.values()}

    def _open(self) -> list[int]:
        return sorted(set(self._admitted) - self._trained() - self._void)

    def standing(self, num_responses: int) -> ResumePoint:
        """Return the queue state to resume from; groups already admitted are not admitted again.

        Scored groups wait for their step; partial responses continue from their finished segments.
        """
        uids: dict[int, list[str]] = defaultdict(list)
        for uid, rows in self._rows.items():
            uids[rows.group].append(uid)
        ready, begun = [], []
        for group in self._open():
            rows_of = [self._rows[uid] for uid in sorted(uids[group], key=_place)]
            if len(rows_of) == num_responses and all(rows.score is not None for rows in rows_of):
                ready.append(tuple(self._trajectories(rows_of, step=None)))
            else:
                responses = tuple(to_partial(self._records(rows.tokens)) for rows in rows_of)
                begun.append(PendingGroup(group, self._admitted[group], responses))
        places = {index for group, index in self._admitted.items() if group not in self._void}
        next_index = max(self._admitted.values(), default=-1) + 1
        return ResumePoint(
            num_trained=len(self._trained()),
            num_void=len(self._void),
            next_group=max(self._admitted, default=-1) + 1,
            next_index=next_index,
            vacant=tuple(index for index in range(next_index) if index not in places),
            open=tuple(begun),
            ready=tuple(ready),
            num_resampled=len(self._resampled),
            resampled=Counter(self._admitted[group] for group in self._resampled),
        )

    def groups(self, step: int) -> list[list[Trajectory]]:
        """Return the groups of a step in their order, as trained. Raises RecorderError if it was not trained."""
        if step not in self._steps:
            raise RecorderError(str(self._folder), f"step {step} is not in the log")
        uids = [uid for _, uid in sorted(self._steps[step].items())]
        trajectories = self._trajectories([self._rows[uid] for uid in uids], step=step)
        return [list(group) for _, group in groupby(trajectories, key=lambda trajectory: trajectory.group)]

    def _trajectories(self, where: Sequence[_Rows], *, step: int | None) -> list[Trajectory]:
        records = iter(self._records([row for rows in where for row in (*rows.tokens, _score(rows))]))
        return [to_trajectory([next(records) for _ in rows.tokens], next(records), step=step) for rows in where]

    def _records(self, rows: Sequence[int]) -> list[Record]:
        """Return the records at these positions of the log, in this order."""
        files = [bisect_right(self._starts, row) - 1 for row in rows]
        found: dict[int, Record] = {}
        for place in sorted(set(files)):
            there = [row for row, file in zip(rows, files, strict=True) if file == place]
            table = self._file(self._names[place]).take([row - self._starts[place] for row in there])
            found |= zip(there, table.to_pylist(), strict=True)
        return [found[row] for row in rows]


def _place(uid: str) -> int:
    """Return the index of a response in its group."""
    return int(uid.rpartition("-")[2])


def _score(rows: _Rows) -> int:
    assert rows.score is not None, "the recorder takes no TRAIN before the SCORE"
    return rows.score
