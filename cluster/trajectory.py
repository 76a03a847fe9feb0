"""Define a trajectory: one frozen dataclass, and one Arrow row with the same fields.

Imports neither torch, ray nor vllm.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa

from cluster.errors import InputError, TrajectoryRefused, first_line
from cluster.files import replacing

SCHEMA_VERSION = b"1"
ROUNDING = 2**-20
"""Rewards that differ by less than this share of the largest are equal: eight times the rounding of a float32."""


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens sampled without a change of weights, seed or actor; `start` indexes the trajectory's `token_ids`."""

    policy_version: int
    start: int
    length: int
    seed: int
    actor: str


@dataclass(frozen=True, slots=True)
class Turn:
    """One response of the policy inside the conversation, with its immediate reward (None: no such reward)."""

    start: int
    length: int
    reward: float | None = None


@dataclass(frozen=True, slots=True)
class Trajectory:
    """A whole conversation. Every per-token list has the same length T; `check` verifies it.

    token_ids [T]; mask [T], true on tokens the policy sampled; behavior_logprobs [T], 0 if the mask is false.
    `sequence_starts` are the starts of the sequences after the first. A token depends on those of its sequence only.
    There is one sequence or, if the history is rendered anew for each turn, one for each turn with its prompt.

    Two turns: prompt 5 6, response 7 8, the environment's answer 9, response 10 (sampled with newer weights):

        token_ids         = [5,   6,   7,    8,    9,   10]
        mask              = [F,   F,   T,    T,    F,   T]
        behavior_logprobs = [0.0, 0.0, -0.7, -1.2, 0.0, -0.3]
        segments          = [Segment(policy_version=3, start=2, length=2, ...),
                             Segment(policy_version=4, start=5, length=1, ...)]
        turns             = [Turn(start=2, length=2), Turn(start=5, length=1, reward=1.0)]
    """

    uid: str
    group: int
    task: str
    token_ids: list[int]
    mask: list[bool]
    behavior_logprobs: list[float]
    segments: list[Segment]
    turns: list[Turn]
    admission_index: int
    finish_reason: str
    reward: float | None = None
    reward_parts: Mapping[str, float] = field(default_factory=dict)
    scorer_version: str = ""
    step: int | None = None
    sequence_starts: list[int] = field(default_factory=list)

    @property
    def num_response_tokens(self) -> int:
        return sum(self.mask)

    @property
    def total_reward(self) -> float:
        """The scorer's reward plus the environment's turn rewards; an unscored trajectory counts as 0."""
        return (self.reward or 0.0) + sum(turn.reward or 0.0 for turn in self.turns)

    @property
    def sequence_lengths(self) -> list[int]:
        """Number of tokens of each sequence."""
        return [end - start for start, end in pairwise([0, *self.sequence_starts, len(self.token_ids)])]

    def tokens_before(self, place: int) -> list[int]:
        """Return the tokens of the same sequence before this place."""
        start = max((start for start in self.sequence_starts if start <= place), default=0)
        return self.token_ids[start:place]

    def check(self) -> Trajectory:
        """Return self. Raises TrajectoryRefused if lengths disagree or segments or turns do not cover the mask."""
        length = len(self.token_ids)
        if len(self.mask) != length or len(self.behavior_logprobs) != length:
            raise TrajectoryRefused(
                self.uid,
                f"per-token lengths disagree: {length} token_ids, {len(self.mask)} mask, "
                f"{len(self.behavior_logprobs)} behavior_logprobs",
            )
        if self.sequence_starts and min(self.sequence_lengths) <= 0:
            raise TrajectoryRefused(self.uid, f"sequence_starts {self.sequence_starts} do not divide {length} tokens")
        for name, spans in (("segments", self.segments), ("turns", self.turns)):
            covered = [False] * length
            for span in spans:
                if span.start < 0 or span.length < 0 or span.start + span.length > length:
                    raise TrajectoryRefused(self.uid, f"{name} reach outside the {length} tokens")
                covered[span.start : span.start + span.length] = [True] * span.length
            if covered != self.mask:
                raise TrajectoryRefused(self.uid, f"{name} do not cover exactly the sampled tokens")
        return self


@dataclass(frozen=True, slots=True)
class PartialResponse:
    """The saved part of an unfinished response: its finished segments; their `start` counts from its first token.

    `finish_reason` is None if more is to be sampled. Of a conversation, whole turns are saved; `given` are the tokens
    before each segment that the policy did not sample (empty for a single turn, which has only the prompt before it).
    """

    uid: str
    token_ids: list[int]
    logprobs: list[float]
    segments: list[Segment]
    finish_reason: str | None = None
    given: list[list[int]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Ticket:
    """An admitted prompt: its place in training, the oldest weights allowed, and the actor that holds it.

    `row` is the prompt's data row; `row["prompt"]` is its text and the other columns go to the scorer. `begun` are
    partial responses that other actors sampled. `task` is the name of the row's task. The group is trained in the step
    after `num_steps_before` of `num_steps` steps.
    """

    group: int
    admission_index: int
    min_policy_version: int
    run_seed: int
    row: Mapping[str, Any]
    owner: str
    begun: tuple[PartialResponse, ...] = ()
    task: str = ""
    num_steps_before: int = 0
    num_steps: int = 0

    def uid(self, index: int) -> str:
        """Return the uid of response `index` of this group."""
        return f"{self.run_seed}-{self.group}-{index}"


FinishedGroup = tuple[Ticket, Sequence[Trajectory]]
"""A ticket with its trajectories."""
PartialGroup = tuple[Ticket, Sequence[int], Sequence[PartialResponse]]
"""A ticket with its prompt's token ids and its partial responses."""


def have_equal_rewards(trajectories: Iterable[Trajectory]) -> bool:
    """Return whether the total rewards differ by no more than rounding."""
    rewards = [trajectory.total_reward for trajectory in trajectories]
    return max(rewards) - min(rewards) <= ROUNDING * max(map(abs, rewards))


def segment_seed(uid: str, segment: int) -> int:
    """Return the sampling seed of a segment: the first 63 bits of blake2b over ``uid:segment``."""
    digest = hashlib.blake2b(f"{uid}:{segment}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


_SEGMENT = pa.struct(
    [
        ("policy_version", pa.int64()),
        ("start", pa.int32()),
        ("length", pa.int32()),
        ("seed", pa.int64()),
        ("actor", pa.string()),
    ]
)
TURN = pa.struct([("start", pa.int32()), ("length", pa.int32()), ("reward", pa.float64())])
SCHEMA = pa.schema(
    [
        ("uid", pa.string()),
        ("group", pa.int64()),
        ("task", pa.string()),
        ("token_ids", pa.list_(pa.int32())),
        ("mask", pa.list_(pa.bool_())),
        ("behavior_logprobs", pa.list_(pa.float32())),
        ("segments", pa.list_(_SEGMENT)),
        ("turns", pa.list_(TURN)),
        ("reward", pa.float64()),
        ("reward_parts", pa.map_(pa.string(), pa.float64())),
        ("scorer_version", pa.string()),
        ("admission_index", pa.int64()),
        ("finish_reason", pa.string()),
        ("step", pa.int64()),
        ("sequence_starts", pa.list_(pa.int32())),
    ],
    metadata={b"antiphon_schema": SCHEMA_VERSION},
)


def to_table(trajectories: Iterable[Trajectory]) -> pa.Table:
    """Convert trajectories to one Arrow row each; checks each."""
    rows = [_to_row(trajectory.check()) for trajectory in trajectories]
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def _to_row(trajectory: Trajectory) -> dict[str, Any]:
    row: dict[str, Any] = {name: getattr(trajectory, name) for name in SCHEMA.names}
    row["segments"] = [{name: getattr(s, name) for name in Segment.__slots__} for s in trajectory.segments]
    row["turns"] = [{name: getattr(t, name) for name in Turn.__slots__} for t in trajectory.turns]
    row["reward_parts"] = list(trajectory.reward_parts.items())
    return row


def from_table(table: pa.Table) -> list[Trajectory]:
    """Convert a table back to trajectories; checks each. The inverse of `to_table`."""
    return [_from_row(row).check() for row in table.to_pylist()]


def _from_row(row: dict[str, Any]) -> Trajectory:
    row = {name: row[name] for name in SCHEMA.names}
    row["segments"] = [Segment(**segment) for segment in row["segments"]]
    row["turns"] = [Turn(**turn) for turn in row["turns"]]
    row["reward_parts"] = dict(row["reward_parts"])
    return Trajectory(**row)


def write_trajectories(path: Path, trajectories: Iterable[Trajectory]) -> None:
    """Write one Arrow IPC file, whole or not at all."""
    table = to_table(trajectories)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial, pa.ipc.new_file(partial, SCHEMA) as writer:
        writer.write_table(table)


def read_trajectories(path: Path) -> list[Trajectory]:
    """Read what `write_trajectories` wrote. Raises InputError if the file is something else."""
    try:
        with pa.memory_map(str(path)) as source:
            table = pa.ipc.open_file(source).read_all()
        table.validate(full=True)
    except (OSError, pa.ArrowException) as error:
        raise InputError(str(path), f"not a file of trajectories ({first_line(error)})") from error
    if "sequence_starts" not in table.column_names:  # written before there were several sequences
        table = table.append_column(SCHEMA.field("sequence_starts"), pa.array([[]] * len(table), pa.list_(pa.int32())))
    if not table.schema.equals(SCHEMA) or (table.schema.metadata or {}) != SCHEMA.metadata:
        raise InputError(str(path), "not a file of trajectories (its columns are others)")
    return from_table(table)
