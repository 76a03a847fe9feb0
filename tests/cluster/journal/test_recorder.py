"""Test the recorder on a real folder: order, repeated calls, fences, restarts, cuts at every byte, and Parquet."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.errors import RecorderError, TrajectoryRefused
from cluster.journal import events, files, recorder
from cluster.journal.files import read_log
from cluster.journal.recorder import Recorder
from cluster.trajectory import PartialResponse, Segment, Ticket, Trajectory, Turn
from cluster.weights.manifest import Manifest, TensorEntry


def ticket(group: int) -> Ticket:
    return Ticket(group, group, 0, 7, {"prompt": f"prompt {group}"}, "rollout-0")


def trajectory(group: int, *, actor: str = "rollout-0") -> Trajectory:
    """Two segments of one response, an environment's turn, a second response, and a last token that was not sampled."""
    return Trajectory(
        uid=f"7-{group}-0",
        group=group,
        task="t",
        token_ids=list(range(group, group + 9)),
        mask=[False, True, True, True, False, False, True, True, False],
        behavior_logprobs=[0.0, -0.5, -1.5, -0.25, 0.0, 0.0, -2.0, -0.125, 0.0],
        segments=[Segment(3, 1, 2, 11, actor), Segment(4, 3, 1, 12, actor), Segment(4, 6, 2, 13, actor)],
        turns=[Turn(1, 3, 0.5), Turn(6, 2)],
        admission_index=group,
        finish_reason="length",
        reward=1 / 3,
        reward_parts={"grammar": 0.1, "length": float("-inf")},
        scorer_version="v1",
    )


def manifest(version: int, incarnation: str = "first") -> Manifest:
    return Manifest(version, incarnation, (TensorEntry("w", (1,), "float32", f"sum-{version}", None),), (), (), None)


def recorded(group: int) -> list[events.Record]:
    """Return the records of a group from its admission to its score."""
    return [events.admit(ticket(group)), *events.finished(trajectory(group))]


def kinds(folder: Path) -> list[str]:
    return list(read_log(folder, ["kind"])["kind"].to_pylist())


STARTED: list[Recorder] = []


@pytest.fixture(autouse=True)
def _no_file_stays_open() -> Iterator[None]:
    """What a process that ends would do for its recorders."""
    yield
    for writer in STARTED:
        for file in (writer._lock, writer._file and writer._file._file):
            if file is not None:
                file.close()
    STARTED.clear()


def started(folder: Path, **settings: Any) -> Recorder:
    STARTED.append(Recorder(folder, **settings))
    return STARTED[-1]


async def begun(
    folder: Path, incarnation: str = "one", *, version: int = 0, group: int = 0, **settings: Any
) -> Recorder:
    writer = started(folder, **settings)
    await writer.begin(incarnation, version=version, group=group, num_steps=9)
    return writer


def crashed(folder: Path, copy: Path) -> Path:
    """The folder as a recorder that was killed now would leave it."""
    shutil.copytree(folder, copy)
    return copy


def test_a_trajectory_comes_back_from_its_records_as_it_was() -> None:
    whole = replace(trajectory(5, actor="rollout-0+2"), step=9)
    *tokens, score = events.finished(whole)
    assert events.to_trajectory(tokens, score, step=9) == whole
    *tokens, score = events.finished(replace(whole, step=None, sequence_starts=[4]))
    assert events.to_trajectory(tokens, score, step=9) == replace(whole, sequence_starts=[4])


def test_segments_that_are_not_in_order_are_refused() -> None:
    whole = trajectory(0)
    with pytest.raises(TrajectoryRefused, match="segment 1 starts before the one before it ends"):
        list(events.finished(replace(whole, segments=whole.segments[::-1])))


async def test_records_are_numbered_in_the_order_of_the_calls(tmp_path: Path) -> None:
    writer = await begun(tmp_path)
    await asyncio.gather(*(writer.record(recorded(group)) for group in range(5)))
    log = read_log(tmp_path)
    assert log["number"].to_pylist() == list(range(1 + 5 * 5))
    assert log["kind"].to_pylist() == ["START", *["ADMIT", "TOKENS", "TOKENS", "TOKENS", "SCORE"] * 5]
    assert [g for g, k in zip(log["group"].to_pylist(), kinds(tmp_path), strict=True) if k == "ADMIT"] == [
        0,
        1,
        2,
        3,
        4,
    ]


async def test_what_waits_together_is_written_with_one_wait_for_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = await begun(tmp_path)
    num_waits = 0

    def append(self: files.LogFile, new: Sequence[events.Record]) -> None:
        nonlocal num_waits
        num_waits += 1
        assert not asyncio._get_running_loop()
        plain(self, new)

    plain = files.LogFile.append
    monkeypatch.setattr(files.LogFile, "append", append)
    await asyncio.gather(*(writer.record(recorded(group)) for group in range(20)))
    assert num_waits <= 2
    assert len(kinds(tmp_path)) == 1 + 20 * 5


async def test_a_repeated_call_changes_nothing(tmp_path: Path) -> None:
    writer = await begun(tmp_path)
    calls = [
        recorded(0),
        recorded(1),
        events.train(1, [[trajectory(0)]]),
        [events.publish(manifest(1))],
        [events.void(ticket(1), "poisoned")],
        [events.fence("rollout-0")],
    ]
    for call in calls:
        await writer.record(call)
        await writer.record(call)
    await writer.begin("one", version=0, group=0, num_steps=9)
    once = kinds(tmp_path)
    assert once == ["START", *(record["kind"] for call in calls for record in call)]
    for call in calls[:3]:
        await writer.record(call)
    assert kinds(tmp_path) == once


async def test_records_of_a_dead_actor_are_refused(tmp_path: Path) -> None:
    writer = await begun(tmp_path)
    await writer.record([events.admit(ticket(0)), events.admit(ticket(1)), events.fence("rollout-0+1")])
    for dead in ("rollout-0", "rollout-0+1"):
        with pytest.raises(TrajectoryRefused, match=r"7-0-0: rollout-0.* was declared dead before it sent this"):
            await writer.record(list(events.finished(trajectory(0, actor=dead))))
    assert "TOKENS" not in kinds(tmp_path)
    await writer.record(list(events.finished(trajectory(0, actor="rollout-0+2"))))
    await writer.record(list(events.finished(trajectory(1, actor="rollout-1"))))
    assert kinds(tmp_path).count("SCORE") == 2


async def test_a_call_repeated_after_its_actor_died_is_no_new_one(tmp_path: Path) -> None:
    writer = await begun(tmp_path)
    await writer.record(recorded(0))
    await writer.record([events.fence("rollout-0")])
    await writer.record(list(events.finished(trajectory(0))))
    assert kinds(tmp_path).count("TOKENS") == 3


@pytest.mark.parametrize(
    ("early", "what"),
    [
        (recorded(1), "group 1: admitted before group 0"),
        (recorded(0)[1:], "TOKENS before its group was admitted"),
        ([recorded(0)[0], recorded(0)[2]], "segment 1 is out of order"),
        ([recorded(0)[0], recorded(0)[-1]], "scored before anything was sampled"),
        ([*recorded(0)[:-1], *events.train(1, [[trajectory(0)]])], "trained before it was scored"),
    ],
)
async def test_a_record_that_comes_too_early_ends_the_log(
    tmp_path: Path, early: list[events.Record], what: str
) -> None:
    writer = await begun(tmp_path)
    for _ in range(2):
        with pytest.raises(RecorderError, match=what):
            await writer.record(early)


async def test_a_killed_recorder_resumes_from_its_own_log(tmp_path: Path) -> None:
    writer = await begun(tmp_path / "log")
    await writer.record([*recorded(0), events.admit(ticket(1)), events.fence("rollout-1")])
    after = crashed(tmp_path / "log", tmp_path / "after")
    successor = started(after)
    await successor.record([*recorded(0), *events.train(1, [[trajectory(0)]])])
    with pytest.raises(TrajectoryRefused):
        await successor.record(list(events.finished(trajectory(1, actor="rollout-1"))))
    await successor.record(list(events.finished(trajectory(1))))
    assert kinds(after) == [
        *("START", "ADMIT", "TOKENS", "TOKENS", "TOKENS", "SCORE", "ADMIT", "FENCE"),
        *("TRAIN", "TOKENS", "TOKENS", "TOKENS", "SCORE"),
    ]


async def test_a_command_resumes_with_open_groups(tmp_path: Path) -> None:
    writer = await begun(tmp_path)
    partial = PartialResponse("7-0-0", [1, 2], [-0.5, -1.5], [Segment(3, 0, 2, 11, "rollout-0")])
    await writer.record([events.admit(ticket(0)), *events.begun((ticket(0), [0], [partial]))])
    await writer.begin("two", version=0, group=1, num_steps=9)
    await writer.record(list(events.finished(trajectory(0))))
    assert kinds(tmp_path) == ["START", "ADMIT", "TOKENS", "START", "TOKENS", "TOKENS", "SCORE"]
    successor = await begun(crashed(tmp_path, tmp_path / "copy"), "three", group=1)
    await successor.record(events.train(1, [[trajectory(0)]]))
    assert kinds(tmp_path / "copy")[-2:] == ["START", "TRAIN"]


async def test_a_resumed_command_admits_open_groups_again(tmp_path: Path) -> None:
    writer = await begun(tmp_path)
    await writer.record([*recorded(0), *events.train(1, [[trajectory(0)]]), *recorded(1), events.fence("rollout-0")])
    await writer.begin("two", version=1, group=1, num_steps=9)
    await writer.record(recorded(1))
    assert kinds(tmp_path).count("ADMIT") == 3
    assert kinds(tmp_path)[-6:] == ["START", "ADMIT", "TOKENS", "TOKENS", "TOKENS", "SCORE"]


async def test_only_one_recorder_writes_to_a_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder, "LOCK_WAIT_S", 0.0)
    writer = await begun(tmp_path)
    with pytest.raises(RecorderError, match="another recorder writes to this log"):
        await begun(tmp_path, "two")
    await writer.close()
    await begun(tmp_path, "two")


async def test_a_log_cut_in_its_last_batch_opens_to_its_last_whole_record(tmp_path: Path) -> None:
    writer = await begun(tmp_path)
    (stream,) = files.open_streams(tmp_path)
    before = stream.stat().st_size
    await writer.record(recorded(0))
    data = stream.read_bytes()

    def num_records(size: int) -> int:
        return sum(batch.num_rows for batch in files.whole_batches(data[:size], stream))

    assert [num_records(size) for size in range(before, len(data))] == [1] * (len(data) - before)
    assert num_records(len(data)) == 6
    assert {num_records(size) for size in range(0, before, 50)} == {0}


async def test_the_log_continues_in_a_new_file_after_a_cut(tmp_path: Path) -> None:
    writer = await begun(tmp_path / "log")
    await writer.record(recorded(0))
    await writer.record(recorded(1))
    after = crashed(tmp_path / "log", tmp_path / "after")
    (stream,) = files.open_streams(after)
    stream.write_bytes(stream.read_bytes()[:-9])
    successor = started(after)
    await successor.record(recorded(1))
    assert [path.name for path in sorted(after.glob("records-*"))] == [
        "records-000000.parquet",
        "records-000001.arrows",
    ]
    assert read_log(after)["number"].to_pylist() == list(range(11))


async def test_a_batch_altered_in_the_middle_is_damage_and_named(tmp_path: Path) -> None:
    writer = await begun(tmp_path)
    for group in (0, 1):
        await writer.record(recorded(group))
    (stream,) = files.open_streams(tmp_path)
    data = stream.read_bytes()
    place = data.index(b"prompt 0")
    stream.write_bytes(data[:place] + b"Prompt 0" + data[place + 8 :])
    with pytest.raises(RecorderError, match=r"records-000000\.arrows: is damaged before byte"):
        read_log(tmp_path)


async def test_a_missing_file_is_named_by_the_record_that_is_missing(tmp_path: Path) -> None:
    writer = await begun(tmp_path, max_file_bytes=1)
    await writer.record(recorded(0))
    await writer.record(recorded(1))
    await writer.close()
    (tmp_path / "records-000001.parquet").unlink()
    with pytest.raises(RecorderError, match="record 1 is missing: 6 stands in its place"):
        read_log(tmp_path)


async def test_an_older_writers_open_log_becomes_parquet_and_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as older:
        older.setattr(files, "SCHEMA", events.SCHEMA.remove(events.SCHEMA.get_field_index("num_steps")))
        await begun(tmp_path / "older", "one")
    log_folder = crashed(tmp_path / "older", tmp_path / "log")
    writer = await begun(log_folder, "two")
    await writer.close()
    assert [path.suffix for path in sorted(log_folder.glob("records-*"))] == [".parquet", ".parquet"]
    log = read_log(log_folder, ["incarnation", "num_steps"])
    assert list(zip(log["incarnation"].to_pylist(), log["num_steps"].to_pylist(), strict=True)) == [
        ("one", None),
        ("two", 9),
    ]


async def test_a_closed_log_is_parquet_that_pandas_and_pyarrow_read_as_it_is(tmp_path: Path) -> None:
    writer = await begun(tmp_path, max_file_bytes=1)
    await writer.record(recorded(0))
    await writer.record([events.publish(manifest(1))])
    await writer.close()
    paths = sorted(tmp_path.glob("*.parquet"))
    assert [path.name for path in tmp_path.glob("records-*.arrows")] == []
    frame = pd.concat(pd.read_parquet(path) for path in paths)
    tokens = frame[frame.kind == "TOKENS"]
    assert [list(ids) for ids in tokens.token_ids] == [[1, 2], [3], [6, 7]]
    assert pa.concat_tables(map(pq.read_table, paths)).equals(read_log(tmp_path))
    assert pq.read_schema(paths[0]).field("logprobs").metadata[b"help"].startswith(b"TOKENS: log-probability")
    with pytest.raises(RecorderError, match="the log is closed"):
        await writer.record(recorded(1))


async def test_a_reader_fills_in_columns_that_an_older_writer_lacked(
    tmp_path: Path,
) -> None:
    writer = await begun(tmp_path)
    await writer.record(recorded(0))
    await writer.close()
    (path,) = tmp_path.glob("*.parquet")
    table = pq.read_table(path)
    other = table.drop_columns(["reason"]).append_column("mood", pa.array(["fine"] * len(table)))
    pq.write_table(other.cast(other.schema.set(0, pa.field("number", pa.int32()))), path)
    read = read_log(tmp_path)
    assert read.schema.equals(events.SCHEMA)
    assert read["reason"].null_count == len(table)
    pq.write_table(table.replace_schema_metadata({b"antiphon_records": b"2"}), path)
    with pytest.raises(RecorderError, match="holds records of version b'2'"):
        read_log(tmp_path)


async def test_every_later_call_raises_after_a_disk_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: files.LogFile, new: Sequence[events.Record]) -> None:
        raise OSError(28, "No space left on device")

    writer = await begun(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(files.LogFile, "append", full)
        with pytest.raises(RecorderError, match=r"cannot be written .*No space left"):
            await writer.record(recorded(0))
    with pytest.raises(RecorderError, match="No space left"):
        await writer.record(recorded(1))
    assert kinds(tmp_path) == ["START"]
