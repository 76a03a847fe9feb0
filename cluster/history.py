"""The history that stands: what a run's log says happened, without what a later command did again.

Counts the ledger and gives back the trajectories of each step as they were trained. Reads; writes nothing.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import pyarrow as pa

from cluster.errors import RecorderError
from cluster.record_log import read_log
from cluster.records import Record, to_trajectory
from cluster.trajectory import Trajectory
from cluster.trajectory_queue import QueueCounts

INDEX = ("kind", "group", "uid", "step", "position", "version")
"""The columns that are read for every record; the others for the trajectories that are asked for."""


@dataclass(slots=True)
class _Rows:
    """Where a trajectory's records are in the log."""

    group: int
    tokens: list[int]
    score: int | None = None


class History:
    """One log, read when this is made. Raises RecorderError where it is damaged."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._table: pa.Table = read_log(folder)
        self._admitted: set[int] = set()
        self._void: set[int] = set()
        self._rows: dict[str, _Rows] = {}
        self._steps: dict[int, dict[int, str]] = defaultdict(dict)
        self._published: dict[int, int] = {}
        for row, record in enumerate(self._table.select(INDEX).to_pylist()):
            self._take(row, record)

    def _take(self, row: int, record: Record) -> None:
        match record["kind"]:
            case "START":
                self._rewind(record["version"], record["group"])
            case "ADMIT":
                self._admitted.add(record["group"])
            case "TOKENS":
                self._rows.setdefault(record["uid"], _Rows(record["group"], [])).tokens.append(row)
            case "SCORE":
                self._rows[record["uid"]].score = row
            case "VOID":
                self._void.add(record["group"])
            case "TRAIN":
                self._steps[record["step"]][record["position"]] = record["uid"]
            case "PUBLISH":
                self._published[record["version"]] = row

    def _rewind(self, version: int, group: int) -> None:
        """Forget what a command that goes on after `version`, with `group` the next to admit, does again."""
        self._admitted = {number for number in self._admitted if number < group}
        self._void = {number for number in self._void if number < group}
        self._rows = {uid: rows for uid, rows in self._rows.items() if rows.group < group}
        for step in [step for step in self._steps if step > version]:
            del self._steps[step]
        self._published = {number: row for number, row in self._published.items() if number <= version}

    @property
    def steps(self) -> list[int]:
        """The trained steps."""
        return sorted(self._steps)

    @property
    def versions(self) -> list[int]:
        """The published versions."""
        return sorted(self._published)

    def checksums(self, version: int) -> dict[str, str]:
        """Each tensor's checksum of a version that was published, as it was last."""
        record = self._records([self._published[version]], "checksums")[0]
        return dict(record["checksums"])

    def counts(self) -> QueueCounts:
        """The ledger, in groups: num_admitted = num_trained + num_void + num_open."""
        trained = {self._rows[uid].group for step in self._steps.values() for uid in step.values()}
        num_open = len(self._admitted - trained - self._void)
        return QueueCounts(len(self._admitted), len(trained), len(self._void), num_open)

    def groups(self, step: int) -> list[list[Trajectory]]:
        """The groups of a step as they were trained, in their order. Raises RecorderError where it was not trained."""
        if step not in self._steps:
            raise RecorderError(str(self._folder), f"step {step} is not in the log")
        uids = [uid for _, uid in sorted(self._steps[step].items())]
        where = [self._rows[uid] for uid in uids]
        records = iter(self._records([row for rows in where for row in (*rows.tokens, _score(rows))]))
        trajectories = [to_trajectory([next(records) for _ in rows.tokens], next(records), step=step) for rows in where]
        return [list(group) for _, group in groupby(trajectories, key=lambda trajectory: trajectory.group)]

    def _records(self, rows: list[int], *columns: str) -> list[Record]:
        table = self._table.select(columns) if columns else self._table
        records: list[Record] = table.take(rows).to_pylist()
        return records


def _score(rows: _Rows) -> int:
    assert rows.score is not None, "the recorder takes no TRAIN before the SCORE"
    return rows.score
