"""The feedback store: idempotent, with retractions, durable, and its exports."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import (
    FeedbackConflict,
    FeedbackRefused,
    FeedbackUnavailable,
    FeedbackUnknown,
    InputError,
)
from reward_service.feedback import database
from reward_service.feedback.schemas import CandidatePair, Correction, Preference, Rating, Receipt
from reward_service.feedback.store import PREFERENCES, Exported, FeedbackStore, export_preferences, read_preferences
from tests.support.paths import ROOT


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "feedback.sqlite"


@pytest.fixture
def store(path: Path) -> Iterator[FeedbackStore]:
    opened = FeedbackStore(path)
    yield opened
    opened.close()


def preference(id: str, annotator: str = "Ann", **changes: Any) -> Preference:
    values = {"prompt": "p", "first": "a", "second": "b", "choice": "first"} | changes
    return Preference(kind="preference", id=id, annotator=annotator, **values)


def pair(id: str, **changes: Any) -> CandidatePair:
    return CandidatePair(id=id, **({"prompt": "p", "first": "a", "second": "b"} | changes))


async def test_repeated_feedback_gets_the_same_receipt(store: FeedbackStore) -> None:
    first = await store.add(preference("x"))
    assert await store.add(preference("x"), token="another") == first
    assert (await store.summary()).total.num_preferences == 1


async def test_conflict_if_an_id_has_other_content(store: FeedbackStore) -> None:
    await store.add(preference("x"))
    for other in (preference("x", choice="tie"), preference("x", "Bob"), preference("x", policy_version="1")):
        with pytest.raises(FeedbackConflict, match=r"^id: x is already stored"):
            await store.add(other)
    rating = Rating(kind="rating", id="x", annotator="Ann", prompt="p", response="a", score=3)
    with pytest.raises(FeedbackConflict):
        await store.add(rating)


async def test_feedback_is_stored_with_annotator_time_and_token(path: Path) -> None:
    now = datetime(2026, 5, 1, 12, 0, tzinfo=UTC)
    store = FeedbackStore(path, now=lambda: now)
    receipt = await store.add(preference("x", policy_version="7@abc"), token="phone")
    store.close()
    assert receipt == Receipt(id="x", time=now)
    row = sqlite3.connect(path).execute("SELECT annotator, token, time, policy_version FROM feedback").fetchone()
    assert row == ("Ann", "phone", "2026-05-01T12:00:00+00:00", "7@abc")


async def test_undone_feedback_stays_as_history(store: FeedbackStore, path: Path) -> None:
    await store.add(preference("x"))
    receipt = await store.retract("x", annotator="Ann")
    assert await store.retract("x", annotator="Ann") == receipt
    assert await store.add(preference("x"))
    assert read_preferences(path).num_rows == 0
    total = (await store.summary()).total
    assert (total.num_preferences, total.num_retracted) == (0, 1)
    assert sqlite3.connect(path).execute("SELECT id FROM feedback").fetchall() == [("x",)]


async def test_only_its_annotator_can_undo_feedback(store: FeedbackStore) -> None:
    await store.add(preference("x"))
    with pytest.raises(FeedbackConflict, match=r"^annotator: feedback x is not Bob's"):
        await store.retract("x", annotator="Bob")
    with pytest.raises(FeedbackUnknown, match=r"^id: there is no feedback y"):
        await store.retract("y", annotator="Ann")


async def test_annotator_labels_a_pair_once_unless_undone(store: FeedbackStore) -> None:
    await store.add_pairs([pair("p1")])
    await store.add(preference("x", pair="p1"))
    await store.add(preference("y", "Bob", pair="p1"))
    with pytest.raises(FeedbackConflict, match=r"^pair: Ann has already labelled pair p1: undo x first"):
        await store.add(preference("z", pair="p1"))
    await store.retract("x", annotator="Ann")
    await store.add(preference("z", pair="p1"))


async def test_a_preference_takes_the_policy_version_of_its_pair(store: FeedbackStore, path: Path) -> None:
    await store.add_pairs([pair("p1", policy_version="3@x")])
    await store.add(preference("x", pair="p1", first="b", second="a"))
    await store.add(preference("x", pair="p1", first="b", second="a"))
    (row,) = read_preferences(path).to_pylist()
    assert (row["chosen"], row["policy_version"], row["pair"]) == ("b", "3@x", "p1")


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"pair": "p2"}, "pair"),
        ({"prompt": "other"}, "pair"),
        ({"first": "c"}, "pair"),
        ({"policy_version": "4@y"}, "policy_version"),
    ],
)
async def test_preference_that_does_not_match_its_pair_is_rejected(
    store: FeedbackStore, changes: dict[str, str], field: str
) -> None:
    await store.add_pairs([pair("p1", policy_version="3@x")])
    with pytest.raises(FeedbackRefused) as caught:
        await store.add(preference("x", **({"pair": "p1"} | changes)))
    assert (caught.value.where, type(caught.value)) == (field, FeedbackRefused)
    assert (await store.summary()).total.num_preferences == 0


async def test_pairs_are_added_all_or_none(store: FeedbackStore) -> None:
    added = await store.add_pairs([pair("p1", policy_version="v"), pair("p2", policy_version="v")])
    assert (added.num_added, added.num_known) == (2, 0)
    with pytest.raises(FeedbackConflict, match="pair p2 is already stored"):
        await store.add_pairs([pair("p3", policy_version="v"), pair("p2", second="c", policy_version="v")])
    again = await store.add_pairs([pair("p2", policy_version="v"), pair("p4", policy_version="v")])
    assert (again.num_added, again.num_known) == (1, 1)
    assert await store.pair_ids("v") == ["p1", "p2", "p4"]


async def test_newer_opinion_of_a_pair_replaces_the_whole_old_one(store: FeedbackStore, path: Path) -> None:
    known = pair("p1", policy_version="v", columns={"level": 3})
    await store.add_pairs([known])
    for opinion in ({"first_reward": 1.0, "second_reward": 2.0, "scorer_version": "m@1"}, {}):
        await store.add_pairs([known.model_copy(update=opinion)])
    assert await store.pairs_not_judged("v", "m@1") == []
    assert await store.pairs_not_judged("v", "m@2") == [known]
    await store.add_pairs([known.model_copy(update={"first_reward": 3.0, "scorer_version": "m@2"})])
    (row,) = sqlite3.connect(path).execute("SELECT first_reward, second_reward, scorer_version FROM pairs")
    assert row == (3.0, None, "m@2")


async def test_file_of_an_older_version_is_upgraded_with_its_content(path: Path) -> None:
    store = FeedbackStore(path)
    await store.add_pairs([pair("p1", policy_version="v")])
    await store.add(preference("x", pair="p1"))
    store.close()
    with sqlite3.connect(path, isolation_level=None) as connection:
        connection.execute("ALTER TABLE pairs DROP COLUMN scorer_version")
        connection.execute("PRAGMA user_version = 1")
    assert read_preferences(path).num_rows == 1
    for _ in range(2):
        store = FeedbackStore(path)
        assert [known.id for known in await store.pairs_not_judged("v", "m@1")] == ["p1"]
        store.close()
    assert read_preferences(path).num_rows == 1


async def test_export_has_preferences_and_corrections_in_trl_columns(store: FeedbackStore, tmp_path: Path) -> None:
    await store.add(preference("1"))
    await store.add(preference("2", choice="second"))
    await store.add(preference("3", choice="tie"))
    await store.add(preference("4", choice="skip"))
    await store.add(Rating(kind="rating", id="5", annotator="Ann", prompt="p", response="a", score=1))
    await store.add(Correction(kind="correction", id="6", annotator="Bob", prompt="p", response="a", corrected="A"))
    output = tmp_path / "out.parquet"
    assert export_preferences(store.path, output) == Exported(num_preferences=3, num_ties=1, num_skips=1)
    table = pq.read_table(output)
    assert table.schema.names == PREFERENCES.names
    assert [(row["chosen"], row["rejected"], row["annotator"]) for row in table.to_pylist()] == [
        ("a", "b", "Ann"),
        ("b", "a", "Ann"),
        ("A", "a", "Bob"),
    ]
    assert table.equals(read_preferences(store.path))
    assert table.equals(await store.preferences())


async def test_agreement_does_not_depend_on_the_order_shown(store: FeedbackStore) -> None:
    await store.add_pairs([pair(f"p{i}") for i in range(4)])
    for i, choice in enumerate(("first", "second", "tie", "first")):
        await store.add(preference(f"a{i}", pair=f"p{i}", choice=choice))
    for i, choice in enumerate(("second", "first", "tie", "skip")):
        await store.add(preference(f"b{i}", "Bob", pair=f"p{i}", first="b", second="a", choice=choice))
    (found,) = (await store.summary()).agreement
    assert (found.annotators, found.num_pairs, found.raw, found.kappa) == (("Ann", "Bob"), 3, 1.0, 1.0)


ANNOTATORS = st.sampled_from(["Ann", "Bob"])
ADD = st.tuples(st.just("add"), st.sampled_from("xyz"), ANNOTATORS, st.sampled_from(["first", "second", "tie"]))
RETRACT = st.tuples(st.just("retract"), st.sampled_from("xyz"), ANNOTATORS, st.none())


@settings(max_examples=20)
@given(st.lists(ADD | RETRACT, max_size=10))
def test_store_equals_a_dictionary_after_any_order_of_calls(calls: list[Any]) -> None:
    kept: dict[str, tuple[str, str]] = {}
    undone: set[str] = set()

    async def replay(store: FeedbackStore) -> None:
        for kind, id, annotator, choice in calls:
            try:
                if kind == "add":
                    await store.add(preference(id, annotator, choice=choice))
                    assert kept.setdefault(id, (annotator, choice)) == (annotator, choice)
                else:
                    await store.retract(id, annotator=annotator)
                    assert kept[id][0] == annotator
                    undone.add(id)
            except FeedbackUnknown:
                assert id not in kept
            except FeedbackConflict:
                assert kept[id] != (annotator, choice)

    with tempfile.TemporaryDirectory() as folder:
        store = FeedbackStore(Path(folder) / "feedback.sqlite")
        try:
            asyncio.run(replay(store))
            rows = read_preferences(store.path).to_pylist()
        finally:
            store.close()
    expected = [(who, choice) for id, (who, choice) in kept.items() if id not in undone and choice != "tie"]
    assert [(row["annotator"], "first" if row["chosen"] == "a" else "second") for row in rows] == expected


async def test_two_processes_may_write_the_same_file(path: Path) -> None:
    stores = [FeedbackStore(path) for _ in range(2)]
    await asyncio.gather(*(stores[i % 2].add(preference(f"x{i}")) for i in range(40)))
    await asyncio.gather(*(store.add(preference("same")) for store in stores))
    for store in stores:
        assert (await store.summary()).total.num_preferences == 41
        store.close()


def test_several_processes_may_create_the_same_file(tmp_path: Path) -> None:
    def make(path: Path, ready: threading.Barrier) -> str:
        ready.wait()
        connection = database.open_to_write(path)
        (store,) = connection.execute("SELECT store FROM identity").fetchone()
        connection.close()
        return str(store)

    with ThreadPoolExecutor(4) as threads:
        for i in range(10):
            path, ready = tmp_path / f"{i}.sqlite", threading.Barrier(4)
            assert len({*threads.map(lambda _, p=path, r=ready: make(p, r), range(4))}) == 1


WRITER = """
import asyncio, sys
from pathlib import Path
from reward_service.feedback.store import FeedbackStore
from reward_service.feedback.schemas import Preference

async def write(store):
    for i in range(1_000_000):
        texts = {"prompt": "p", "first": "a", "second": "b", "choice": "tie"}
        receipt = await store.add(Preference(kind="preference", id=f"x{i}", annotator="A", **texts))
        print(receipt.id, flush=True)

asyncio.run(write(FeedbackStore(Path(sys.argv[1]))))
"""


@pytest.mark.process
def test_acknowledged_feedback_survives_a_killed_writer(path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    acknowledged = [process.stdout.readline().strip() for _ in range(30)]
    os.kill(process.pid, signal.SIGKILL)
    acknowledged += process.stdout.read().split("\n")[:-1]
    process.communicate(timeout=30)
    store = FeedbackStore(path)
    assert asyncio.run(store.summary()).total.num_ties >= len(acknowledged) >= 30
    store.close()
    stored = {row[0] for row in sqlite3.connect(path).execute("SELECT id FROM feedback")}
    assert set(acknowledged) <= stored


async def test_locked_file_is_unavailable_and_named(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "BUSY_TIMEOUT_S", 0.01)
    store = FeedbackStore(path)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(FeedbackUnavailable, match="database is locked") as caught:
        await store.add(preference("x"))
    assert caught.value.where == str(path)
    other.execute("ROLLBACK")
    await store.add(preference("x"))
    store.close()


def _newer(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 3")


def _others(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE songs (name TEXT)")


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (_newer, "has version 3, and this program reads up to 2"),
        (_others, "is an SQLite file with other content"),
        (lambda path: path.write_bytes(b"no database" * 100), "cannot be opened as a file of feedback"),
    ],
)
def test_newer_or_other_file_is_rejected_unchanged(path: Path, make: Any, what: str) -> None:
    make(path)
    before = path.read_bytes()
    for open_it in (FeedbackStore, read_preferences):
        with pytest.raises(InputError, match=what) as caught:
            open_it(path)
        assert caught.value.where == str(path)
    assert path.read_bytes() == before


def test_reading_a_missing_file_is_an_error_and_creates_none(path: Path) -> None:
    with pytest.raises(InputError, match="no such file of feedback"):
        read_preferences(path)
    assert not path.exists()
