"""Test the trajectory record."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from cluster.errors import TrajectoryRefused
from cluster.trajectory import (
    Segment,
    Trajectory,
    Turn,
    from_table,
    read_trajectories,
    segment_seed,
    to_table,
    write_trajectories,
)

TWO_TURNS = Trajectory(
    uid="7-3-0",
    group=3,
    task="reviews",
    token_ids=[5, 6, 7, 8, 9, 10],
    mask=[False, True, True, False, True, True],
    behavior_logprobs=[0.0, -0.5, -0.25, 0.0, -1.0, -2.0],
    segments=[Segment(1, 1, 2, 11, "rollout-0"), Segment(1, 4, 1, 12, "rollout-0"), Segment(2, 5, 1, 13, "rollout-1")],
    turns=[Turn(1, 2, 0.5), Turn(4, 2)],
    admission_index=3,
    finish_reason="stop",
    reward=1.5,
    reward_parts={"oracle": 1.0, "length": 0.5},
    scorer_version="abc",
    step=2,
)


def test_a_two_turn_trajectory_passes_through_arrow_unchanged() -> None:
    assert from_table(to_table([TWO_TURNS])) == [TWO_TURNS]


def test_step_file_is_read_back_and_leaves_no_partial_file(tmp_path: Path) -> None:
    write_trajectories(tmp_path / "step.arrow", [TWO_TURNS, replace(TWO_TURNS, uid="7-3-1")])
    assert [t.uid for t in read_trajectories(tmp_path / "step.arrow")] == ["7-3-0", "7-3-1"]
    assert [p.name for p in tmp_path.iterdir()] == ["step.arrow"]


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"mask": [True]}, "per-token lengths disagree"),
        ({"behavior_logprobs": [0.0]}, "per-token lengths disagree"),
        ({"segments": [Segment(1, 1, 2, 11, "a")]}, "segments do not cover"),
        ({"segments": [Segment(1, 1, 9, 11, "a")]}, "segments reach outside"),
        ({"turns": []}, "turns do not cover"),
        ({"sequence_starts": [3, 3]}, "sequence_starts .* do not divide 6 tokens"),
        ({"sequence_starts": [6]}, "sequence_starts .* do not divide 6 tokens"),
    ],
)
def test_a_record_that_contradicts_itself_is_refused_by_uid(change: dict, what: str) -> None:
    with pytest.raises(TrajectoryRefused, match=f"7-3-0: {what}"):
        replace(TWO_TURNS, **change).check()


def test_a_token_depends_on_its_own_sequence_only(tmp_path: Path) -> None:
    several = replace(TWO_TURNS, sequence_starts=[3]).check()
    assert several.sequence_lengths == [3, 3]
    assert [several.tokens_before(place) for place in (2, 3, 5)] == [[5, 6], [], [8, 9]]
    assert TWO_TURNS.tokens_before(5) == [5, 6, 7, 8, 9]
    write_trajectories(tmp_path / "step.arrow", [several])
    assert read_trajectories(tmp_path / "step.arrow") == [several]


def test_a_file_from_before_there_were_sequences_is_read(tmp_path: Path) -> None:
    table = to_table([TWO_TURNS]).drop_columns(["sequence_starts"])
    with pa.ipc.new_file(tmp_path / "old.arrow", table.schema) as writer:
        writer.write_table(table)
    assert read_trajectories(tmp_path / "old.arrow") == [TWO_TURNS]


def test_a_segment_seed_is_the_first_63_bits_of_blake2b() -> None:
    digest = hashlib.blake2b(b"7-3-0:2", digest_size=8).hexdigest()
    assert segment_seed("7-3-0", 2) == int(bin(int(digest, 16))[2:].zfill(64)[:63], 2)
