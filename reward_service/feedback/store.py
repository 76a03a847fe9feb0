"""Stores human feedback durably: preferences, ratings, corrections, and the pairs to ask about.

Feedback is on disk when a call returns. It is never changed: undoing it adds a retraction. Reward models are trained
on `read_preferences`.
"""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.errors import FeedbackConflict, FeedbackRefused, FeedbackUnavailable, FeedbackUnknown, InputError
from cluster.files import replacing
from reward_service.feedback.agreement import agreements, mean_agreement
from reward_service.feedback.database import open_to_read, open_to_write, transaction
from reward_service.feedback.schemas import (
    CandidatePair,
    Correction,
    Counts,
    MeanAgreement,
    NextPair,
    PairAgreement,
    PairsAdded,
    Preference,
    Progress,
    Rating,
    Receipt,
    ShownPair,
    Summary,
)
from reward_service.feedback.selection import FeedbackSettings, choose, is_swapped, ticket_of

Result = TypeVar("Result")
NUM_HELD = 2
MAX_HOLDERS = 1000
PREFERENCES = pa.schema(
    [
        ("prompt", pa.string()),
        ("chosen", pa.string()),
        ("rejected", pa.string()),
        ("annotator", pa.string()),
        ("policy_version", pa.string()),
        ("time", pa.timestamp("us", tz="UTC")),
        ("pair", pa.string()),
    ]
)
"""TRL's columns, then the annotator, the policy, the time and the candidate pair."""
SELECT_PREFERENCES = """
    SELECT prompt, iif(kind = 'correction', corrected, iif(choice = 'first', first, second)) AS chosen,
    iif(kind = 'correction', response, iif(choice = 'first', second, first)) AS rejected,
    annotator, policy_version, time, pair
    FROM active WHERE kind = 'correction' OR choice IN ('first', 'second') ORDER BY position
"""
SELECT_LABELS = """
    SELECT active.annotator, active.pair,
    iif(choice = 'tie', 'tie', iif((choice = 'first') = (active.first = pairs.first), 'first', 'second'))
    FROM active JOIN pairs ON pairs.id = active.pair WHERE choice != 'skip'
"""
OPINION = ("first_reward", "second_reward", "uncertainty", "scorer_version")
"""Columns with a reward model's opinion of a pair."""
COUNT = """
    SELECT annotator, sum(is_active AND choice IN ('first', 'second')), sum(is_active AND choice = 'tie'),
    sum(is_active AND choice = 'skip'), sum(is_active AND kind = 'rating'), sum(is_active AND kind = 'correction'),
    sum(NOT is_active)
    FROM (SELECT *, id NOT IN (SELECT feedback FROM retractions) AS is_active FROM feedback)
    GROUP BY annotator ORDER BY annotator
"""


@dataclass(frozen=True, slots=True)
class Exported:
    """Number of exported preferences, and of the ties and skips that are left out."""

    num_preferences: int
    num_ties: int
    num_skips: int


class FeedbackStore:
    """Feedback in the SQLite file at `path`, which is created if missing; `close` it at the end.

    One thread writes and one reads, each with its own connection, so the event loop never waits for the disk. Other
    processes may write the same file. Raises InputError for a file of a newer version or with other content; every
    method raises FeedbackUnavailable if the file can't be written or read now.
    """

    def __init__(self, path: Path, *, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self.path = path
        self._now = now
        self._writes = ThreadPoolExecutor(max_workers=1, thread_name_prefix="feedback-writes")
        self._reads = ThreadPoolExecutor(max_workers=1, thread_name_prefix="feedback-reads")
        try:
            self._writing = self._writes.submit(open_to_write, path).result()
            self._reading = self._reads.submit(open_to_read, path).result()
        except BaseException:
            self._writes.shutdown()
            self._reads.shutdown()
            raise
        self._held: OrderedDict[str, deque[str]] = OrderedDict()

    def close(self) -> None:
        """Wait for running calls and close the file."""
        self._reads.submit(self._reading.close).result()
        self._writes.submit(self._writing.close).result()
        self._reads.shutdown()
        self._writes.shutdown()

    async def add(self, feedback: Preference | Rating | Correction, *, token: str | None = None) -> Receipt:
        """Store feedback; repeating it changes nothing and returns the same receipt.

        `token` is the token's name.

        Raises FeedbackConflict for an id that has other content and for a pair that the annotator has labelled already,
        FeedbackRefused if the feedback doesn't match its pair.
        """
        receipt = await self._write(self._add, feedback, token)
        pair = feedback.pair if isinstance(feedback, Preference) else None
        held = self._held.get(feedback.annotator, ())
        if pair is not None and pair in held:
            self._held[feedback.annotator].remove(pair)
        return receipt

    async def retract(self, id: str, *, annotator: str, token: str | None = None) -> Receipt:
        """Undo feedback of the annotator; it stays as history. Repeating this changes nothing.

        Raises FeedbackUnknown for an unknown id, FeedbackConflict if the feedback is another annotator's.
        """
        return await self._write(self._retract, id, annotator, token)

    async def add_pairs(self, pairs: Sequence[CandidatePair]) -> PairsAdded:
        """Add all pairs, or none: raises FeedbackConflict if one is known with other texts.

        If a known pair comes with any opinion of a reward model, all of its stored opinion is replaced: the new one is
        from a newer model.
        """
        return await self._write(self._add_pairs, pairs)

    async def pair_ids(self, policy_version: str) -> list[str]:
        """Return the ids of the policy's pairs, in the order in which they were added."""
        return await self._read(self._pair_ids, policy_version)

    async def pairs_not_judged(self, policy_version: str, scorer_version: str) -> list[CandidatePair]:
        """Return the policy's pairs that have no opinion of the reward model `scorer_version` yet."""
        return await self._read(self._pairs_not_judged, policy_version, scorer_version)

    async def next_pair(
        self, annotator: str, settings: FeedbackSettings = FeedbackSettings(), *, excepted: Sequence[str] = ()
    ) -> NextPair:
        """Return the annotator's next question; `excepted` are pairs whose labels are still in transit.

        A pair is reserved for the annotator during the next NUM_HELD questions, so that concurrent annotators get
        different pairs while there are enough.
        """
        held = [pair for name, pairs in self._held.items() if name != annotator for pair in pairs]
        answer = await self._read(self._ask, annotator, settings, excepted, held)
        if answer.pair is not None:
            self._hold(annotator, answer.pair.id)
        return answer

    async def summary(self) -> Summary:
        """Return counts and agreement of all feedback that was not undone."""
        return await self._read(self._summary)

    async def preferences(self) -> pa.Table:
        """Return the table of `read_preferences`."""
        return await self._read(lambda: _preferences(self._reading))

    async def _write(self, function: Callable[..., Result], *args: Any) -> Result:
        return await self._in_thread(self._writes, self._writing, "IMMEDIATE", function, *args)

    async def _read(self, function: Callable[..., Result], *args: Any) -> Result:
        return await self._in_thread(self._reads, self._reading, "DEFERRED", function, *args)

    async def _in_thread(
        self,
        thread: ThreadPoolExecutor,
        connection: sqlite3.Connection,
        mode: str,
        function: Callable[..., Result],
        *args: Any,
    ) -> Result:
        def run() -> Result:
            with available(self.path), transaction(connection, mode):
                return function(*args)

        return await asyncio.get_running_loop().run_in_executor(thread, run)

    def _add(self, feedback: Preference | Rating | Correction, token: str | None) -> Receipt:
        values = feedback.model_dump()
        if isinstance(feedback, Preference) and feedback.pair is not None:
            values["policy_version"] = self._version_of_pair(feedback)
        known = self._writing.execute("SELECT * FROM feedback WHERE id = ?", (feedback.id,)).fetchone()
        if known is not None:
            if any(known[name] != value for name, value in values.items()):
                raise FeedbackConflict("id", f"{feedback.id} is already stored with other content")
            return Receipt(id=feedback.id, time=datetime.fromisoformat(known["time"]))
        if isinstance(feedback, Preference) and feedback.pair is not None:
            self._require_unlabelled(feedback.pair, feedback.annotator)
        now = self._now()
        _insert(self._writing, "feedback", values | {"token": token, "time": now.isoformat()})
        return Receipt(id=feedback.id, time=now)

    def _version_of_pair(self, feedback: Preference) -> str | None:
        """Return the policy version of the preference's pair, after checking that their texts match."""
        pair = self._writing.execute("SELECT * FROM pairs WHERE id = ?", (feedback.pair,)).fetchone()
        if pair is None:
            raise FeedbackRefused("pair", f"there is no pair {feedback.pair}")
        same_texts = {feedback.first, feedback.second} == {pair["first"], pair["second"]}
        if feedback.prompt != pair["prompt"] or not same_texts:
            raise FeedbackRefused("pair", f"prompt and responses do not match pair {feedback.pair}")
        if feedback.policy_version not in (None, pair["policy_version"]):
            raise FeedbackRefused("policy_version", f"pair {feedback.pair} is of policy {pair['policy_version']}")
        version: str | None = pair["policy_version"]
        return version

    def _require_unlabelled(self, pair: str, annotator: str) -> None:
        query = "SELECT id FROM active WHERE pair = ? AND annotator = ?"
        if row := self._writing.execute(query, (pair, annotator)).fetchone():
            raise FeedbackConflict("pair", f"{annotator} has already labelled pair {pair}: undo {row['id']} first")

    def _retract(self, id: str, annotator: str, token: str | None) -> Receipt:
        feedback = self._writing.execute("SELECT annotator FROM feedback WHERE id = ?", (id,)).fetchone()
        if feedback is None:
            raise FeedbackUnknown("id", f"there is no feedback {id}")
        if feedback["annotator"] != annotator:
            raise FeedbackConflict("annotator", f"feedback {id} is not {annotator}'s")
        known = self._writing.execute("SELECT time FROM retractions WHERE feedback = ?", (id,)).fetchone()
        if known is not None:
            return Receipt(id=id, time=datetime.fromisoformat(known["time"]))
        now = self._now()
        row = {"feedback": id, "annotator": annotator, "token": token, "time": now.isoformat()}
        _insert(self._writing, "retractions", row)
        return Receipt(id=id, time=now)

    def _add_pairs(self, pairs: Sequence[CandidatePair]) -> PairsAdded:
        num_added = 0
        for pair in pairs:
            values = pair.model_dump() | {"columns": json.dumps(pair.columns, sort_keys=True, allow_nan=False)}
            opinion = {name: values.pop(name) for name in OPINION}
            known = self._writing.execute("SELECT * FROM pairs WHERE id = ?", (pair.id,)).fetchone()
            if known is None:
                more = {"ticket": ticket_of(pair.id), "time": self._now().isoformat()}
                _insert(self._writing, "pairs", values | opinion | more)
                num_added += 1
                continue
            if any(known[name] != value for name, value in values.items()):
                raise FeedbackConflict("pairs", f"pair {pair.id} is already stored with other content")
            if any(value is not None for value in opinion.values()):
                changes = ", ".join(f"{name} = :{name}" for name in OPINION)
                self._writing.execute(f"UPDATE pairs SET {changes} WHERE id = :id", opinion | {"id": pair.id})
        return PairsAdded(num_added=num_added, num_known=len(pairs) - num_added)

    def _pair_ids(self, policy_version: str) -> list[str]:
        query = "SELECT id FROM pairs WHERE policy_version = ? ORDER BY position"
        return [row["id"] for row in self._reading.execute(query, (policy_version,))]

    def _pairs_not_judged(self, policy_version: str, scorer_version: str) -> list[CandidatePair]:
        query = "SELECT * FROM pairs WHERE policy_version = ? AND scorer_version IS NOT ? ORDER BY position"
        names = ("id", "prompt", "first", "second", "policy_version")
        return [
            CandidatePair(**{name: row[name] for name in names}, columns=json.loads(row["columns"]))
            for row in self._reading.execute(query, (policy_version, scorer_version))
        ]

    def _ask(
        self, annotator: str, settings: FeedbackSettings, excepted: Sequence[str], held: Sequence[str]
    ) -> NextPair:
        asked = choose(self._reading, annotator, settings, excepted=excepted, held=held)
        (store,) = self._reading.execute("SELECT store FROM identity").fetchone()
        pair = _shown(asked.pair, annotator, settings.seed) if asked.pair is not None else None
        return NextPair(pair=pair, progress=Progress(num_done=asked.num_done, num_left=asked.num_left), store=store)

    def _hold(self, annotator: str, pair: str) -> None:
        """Reserve a pair for the annotator; forgets the annotators who asked longest ago."""
        pairs = self._held.setdefault(annotator, deque(maxlen=NUM_HELD))
        self._held.move_to_end(annotator)
        if pair not in pairs:
            pairs.append(pair)
        while len(self._held) > MAX_HOLDERS:
            self._held.popitem(last=False)

    def _summary(self) -> Summary:
        names = list(Counts.model_fields)
        annotators = {
            annotator: Counts(**{name: count or 0 for name, count in zip(names, counts, strict=True)})
            for annotator, *counts in self._reading.execute(COUNT)
        }
        total = {name: sum(getattr(counts, name) for counts in annotators.values()) for name in names}
        (num_pairs,) = self._reading.execute("SELECT count(*) FROM pairs").fetchone()
        labels = [tuple(row) for row in self._reading.execute(SELECT_LABELS)]
        found = agreements(labels)
        mean_raw, mean_kappa = mean_agreement(found) if found else (0.0, None)
        return Summary(
            num_pairs=num_pairs,
            num_pairs_labelled=len({pair for _, pair, _ in labels}),
            total=Counts(**total),
            annotators=annotators,
            agreement=[
                PairAgreement(annotators=a.annotators, num_pairs=a.num_items, raw=a.raw, kappa=a.kappa) for a in found
            ],
            mean_agreement=MeanAgreement(raw=mean_raw, kappa=mean_kappa) if found else None,
        )


@contextmanager
def available(path: Path) -> Iterator[None]:
    """Raise FeedbackUnavailable for a locked file or a full disk."""
    try:
        yield
    except sqlite3.OperationalError as error:
        raise FeedbackUnavailable(str(path), str(error)) from error


def read_preferences(path: Path) -> pa.Table:
    """Read the preferences in the feedback file, oldest first, in the columns PREFERENCES.

    A correction is preferred to the response that it corrects; ties, skips, ratings and undone feedback are left out. A
    pair that several annotators labelled has a row for each. Raises InputError if there is no such file.
    """
    connection = open_to_read(path)
    try:
        with available(path):
            return _preferences(connection)
    finally:
        connection.close()


def export_preferences(store: Path, output: Path) -> Exported:
    """Write the table of `read_preferences` as Parquet, atomically.

    Raises InputError as `read_preferences` does, and if the output cannot be written.
    """
    connection = open_to_read(store)
    try:
        with available(store), transaction(connection, "DEFERRED"):
            table = _preferences(connection)
            query = "SELECT count(*) FROM active WHERE choice = ?"
            num_ties, num_skips = (connection.execute(query, (choice,)).fetchone()[0] for choice in ("tie", "skip"))
    finally:
        connection.close()
    try:
        with replacing(output) as partial:
            pq.write_table(table, partial)
    except OSError as error:
        raise InputError(str(output), f"cannot be written ({error})") from error
    return Exported(table.num_rows, num_ties, num_skips)


def _preferences(connection: sqlite3.Connection) -> pa.Table:
    rows = connection.execute(SELECT_PREFERENCES).fetchall()
    columns: dict[str, list[Any]] = {name: [row[name] for row in rows] for name in PREFERENCES.names}
    columns["time"] = [datetime.fromisoformat(time) for time in columns["time"]]
    return pa.table(columns, schema=PREFERENCES)


def _shown(pair: sqlite3.Row, annotator: str, seed: int) -> ShownPair:
    first, second = pair["first"], pair["second"]
    if is_swapped(seed, annotator, pair["id"]):
        first, second = second, first
    return ShownPair(
        id=pair["id"], prompt=pair["prompt"], first=first, second=second, policy_version=pair["policy_version"]
    )


def _insert(connection: sqlite3.Connection, table: str, values: Mapping[str, Any]) -> None:
    names = ", ".join(values)
    places = ", ".join(f":{name}" for name in values)
    connection.execute(f"INSERT INTO {table} ({names}) VALUES ({places})", values)
