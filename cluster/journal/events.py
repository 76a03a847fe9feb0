"""Define the events of the journal: one row of one schema for everything that happened in a run.

| kind | one per | content |
|---|---|---|
| START | a command | the run resumes after `version` with `settings`, for `num_steps` steps; later records are void |
| ADMIT | a group | its number (`admission_index`), prompt, run's seed and floor |
| TOKENS | a closed segment | its tokens, their log-probabilities, version, seed, the actor and its generation |
| SCORE | a trajectory | its reward with parts and scorer version, turns and finish reason; its segments are complete |
| VOID | a group | why it was voided |
| TRAIN | a trajectory | step, and position in the step's batch |
| PUBLISH | a version | (incarnation of the learner, number, checksum of every tensor) |
| FENCE | an actor | this generation of it, and earlier ones, were declared dead |

A column is null if a kind does not use it; the `help` metadata of each field of `SCHEMA` describes it. SCHEMA_VERSION
changes if a column changes its meaning; new columns and kinds do not change it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa

from cluster.errors import TrajectoryRefused
from cluster.trajectory import TURN, PartialGroup, PartialResponse, Segment, Ticket, Trajectory, Turn
from cluster.weights.manifest import Manifest

SCHEMA_VERSION = b"1"
EQUAL_REWARDS = "all responses have equal rewards: replaced by another prompt (learner.zero_variance_groups)"
"""The reason of a VOID of a group that is sampled again with another prompt."""
Record = dict[str, Any]
"""Columns by name; those left out are null."""


def _column(name: str, kind: pa.DataType, what: str) -> pa.Field:
    return pa.field(name, kind, metadata={b"help": what.encode()})


SCHEMA = pa.schema(
    [
        _column("number", pa.int64(), "place of the record in the log, from 0"),
        _column("time_s", pa.float64(), "when the recorder took it, seconds since 1970"),
        _column("kind", pa.string(), "START, ADMIT, TOKENS, SCORE, VOID, TRAIN, PUBLISH or FENCE"),
        _column("incarnation", pa.string(), "START: of the command; PUBLISH: of the learner"),
        _column("version", pa.int64(), "START, PUBLISH: policy version"),
        _column("settings", pa.string(), "START: the settings of the run file from then on, as JSON"),
        _column("num_steps", pa.int64(), "START: number of steps of the run"),
        _column("group", pa.int64(), "START: next group to admit. Other kinds: the record's group"),
        _column("uid", pa.string(), "TOKENS, SCORE, TRAIN: the trajectory; ADMIT, VOID: the first of its group"),
        _column("admission_index", pa.int64(), "ADMIT, SCORE: place in training"),
        _column("prompt", pa.string(), "ADMIT: the prompt's text, or its messages as JSON"),
        _column("seed", pa.int64(), "ADMIT: the run's; TOKENS: the segment's"),
        _column("min_policy_version", pa.int64(), "ADMIT: oldest version that its tokens may be sampled with"),
        _column("segment", pa.int32(), "TOKENS: number of the segment in its trajectory"),
        _column("given_token_ids", pa.list_(pa.int32()), "TOKENS, SCORE: tokens before it that were not sampled"),
        _column("token_ids", pa.list_(pa.int32()), "TOKENS: the sampled tokens"),
        _column("logprobs", pa.list_(pa.float32()), "TOKENS: log-probability of each, in nats"),
        _column("policy_version", pa.int64(), "TOKENS: the version that sampled them"),
        _column("actor", pa.string(), "TOKENS, FENCE: the actor"),
        _column("generation", pa.int64(), "TOKENS, FENCE: how often it had been replaced"),
        _column("task", pa.string(), "SCORE: name of its task; of the run if it names no tasks"),
        _column("reward", pa.float64(), "SCORE: the scorer's reward"),
        _column("reward_parts", pa.map_(pa.string(), pa.float64()), "SCORE: its parts"),
        _column("scorer_version", pa.string(), "SCORE: version of the scorer"),
        _column("turns", pa.list_(TURN), "SCORE: the responses in the conversation, with their own rewards"),
        _column("sequence_starts", pa.list_(pa.int32()), "SCORE: where its sequences after the first start"),
        _column("finish_reason", pa.string(), "SCORE, TOKENS of a last segment: stop or length"),
        _column("reason", pa.string(), "VOID: why"),
        _column("step", pa.int64(), "TRAIN: the step"),
        _column("position", pa.int64(), "TRAIN: place in its batch"),
        _column("checksums", pa.map_(pa.string(), pa.string()), "PUBLISH: of every tensor, by its name"),
    ],
    metadata={b"antiphon_records": SCHEMA_VERSION},
)


def start(incarnation: str, *, version: int, group: int, num_steps: int, settings: str | None = None) -> Record:
    """Record that a command starts a run of `num_steps` steps, or resumes it after `version`."""
    return {
        "kind": "START",
        "incarnation": incarnation,
        "version": version,
        "num_steps": num_steps,
        "settings": settings,
        "group": group,
    }


def admit(ticket: Ticket) -> Record:
    """Record that a prompt was admitted."""
    return {
        "kind": "ADMIT",
        "group": ticket.group,
        "uid": ticket.uid(0),
        "admission_index": ticket.admission_index,
        "prompt": _text(ticket.row["prompt"]),
        "seed": ticket.run_seed,
        "min_policy_version": ticket.min_policy_version,
    }


def _text(prompt: Any) -> str:
    """Return a prompt as text: messages, which the rollout actor renders, as JSON."""
    return prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False, default=str)


def finished(trajectory: Trajectory) -> Iterator[Record]:
    """Yield the TOKENS of each segment, then the SCORE.

    Raises TrajectoryRefused if segments are not in order: the tokens before one would be ambiguous.
    """
    trajectory.check()
    end, last = 0, len(trajectory.segments) - 1
    for number, segment in enumerate(trajectory.segments):
        if segment.start < end:
            raise TrajectoryRefused(trajectory.uid, f"segment {number} starts before the one before it ends")
        given = trajectory.token_ids[end : segment.start]
        end = segment.start + segment.length
        yield _tokens(
            group=trajectory.group,
            uid=trajectory.uid,
            number=number,
            segment=segment,
            given=given,
            token_ids=trajectory.token_ids[segment.start : end],
            logprobs=trajectory.behavior_logprobs[segment.start : end],
            finish_reason=trajectory.finish_reason if number == last else None,
        )
    yield {
        "kind": "SCORE",
        "group": trajectory.group,
        "uid": trajectory.uid,
        "admission_index": trajectory.admission_index,
        "given_token_ids": trajectory.token_ids[end:],
        "task": trajectory.task,
        "reward": trajectory.reward,
        "reward_parts": list(trajectory.reward_parts.items()),
        "scorer_version": trajectory.scorer_version,
        "turns": [{name: getattr(turn, name) for name in Turn.__slots__} for turn in trajectory.turns],
        "sequence_starts": trajectory.sequence_starts,
        "finish_reason": trajectory.finish_reason,
    }


def begun(group: PartialGroup) -> Iterator[Record]:
    """Yield the TOKENS of the finished segments of an unfinished group."""
    ticket, prompt_token_ids, responses = group
    for response in responses:
        last = len(response.segments) - 1
        for number, segment in enumerate(response.segments):
            span = slice(segment.start, segment.start + segment.length)
            yield _tokens(
                group=ticket.group,
                uid=response.uid,
                number=number,
                segment=segment,
                given=response.given[number] if response.given else [] if number else prompt_token_ids,
                token_ids=response.token_ids[span],
                logprobs=response.logprobs[span],
                finish_reason=response.finish_reason if number == last else None,
            )


def _tokens(
    *,
    group: int,
    uid: str,
    number: int,
    segment: Segment,
    given: Sequence[int],
    token_ids: Sequence[int],
    logprobs: Sequence[float],
    finish_reason: str | None,
) -> Record:
    actor, generation = actor_generation(segment.actor)
    return {
        "kind": "TOKENS",
        "group": group,
        "uid": uid,
        "segment": number,
        "given_token_ids": given,
        "token_ids": token_ids,
        "logprobs": logprobs,
        "policy_version": segment.policy_version,
        "seed": segment.seed,
        "actor": actor,
        "generation": generation,
        "finish_reason": finish_reason,
    }


def to_partial(tokens: Sequence[Record]) -> PartialResponse:
    """Rebuild a partial response from the records of `begun`."""
    token_ids, logprobs, segments = list[int](), list[float](), list[Segment]()
    for record in tokens:
        actor = actor_name(record["actor"], record["generation"])
        sampled = record["token_ids"]
        segments.append(Segment(record["policy_version"], len(token_ids), len(sampled), record["seed"], actor))
        token_ids += sampled
        logprobs += record["logprobs"]
    given = [record["given_token_ids"] for record in tokens]
    return PartialResponse(tokens[0]["uid"], token_ids, logprobs, segments, tokens[-1]["finish_reason"], given)


def to_trajectory(tokens: Sequence[Record], score: Record, *, step: int | None = None) -> Trajectory:
    """Rebuild a trajectory from the records of `finished`, as trained in `step`."""
    token_ids, mask, logprobs, segments = list[int](), list[bool](), list[float](), list[Segment]()
    for record in tokens:
        given, sampled = record["given_token_ids"], record["token_ids"]
        actor = actor_name(record["actor"], record["generation"])
        start = len(token_ids) + len(given)
        segments.append(Segment(record["policy_version"], start, len(sampled), record["seed"], actor))
        token_ids += [*given, *sampled]
        mask += [False] * len(given) + [True] * len(sampled)
        logprobs += [0.0] * len(given) + record["logprobs"]
    given = score["given_token_ids"]
    return Trajectory(
        uid=score["uid"],
        group=score["group"],
        task=score["task"],
        token_ids=[*token_ids, *given],
        mask=mask + [False] * len(given),
        behavior_logprobs=logprobs + [0.0] * len(given),
        segments=segments,
        turns=[Turn(**turn) for turn in score["turns"]],
        admission_index=score["admission_index"],
        finish_reason=score["finish_reason"],
        reward=score["reward"],
        reward_parts=dict(score["reward_parts"]),
        scorer_version=score["scorer_version"],
        step=step,
        sequence_starts=score["sequence_starts"] or [],
    ).check()


def void(ticket: Ticket, reason: str) -> Record:
    """Record that a group was voided."""
    return {"kind": "VOID", "group": ticket.group, "uid": ticket.uid(0), "reason": reason}


def train(step: int, groups: Sequence[Sequence[Trajectory]]) -> list[Record]:
    """Record that a step was trained on these groups, in this order."""
    trajectories = [trajectory for group in groups for trajectory in group]
    return [
        {"kind": "TRAIN", "group": trajectory.group, "uid": trajectory.uid, "step": step, "position": position}
        for position, trajectory in enumerate(trajectories)
    ]


def publish(manifest: Manifest) -> Record:
    """Record that a version was published."""
    return {
        "kind": "PUBLISH",
        "incarnation": manifest.incarnation,
        "version": manifest.version,
        "checksums": list(manifest.checksums().items()),
    }


def fence(name: str) -> Record:
    """Record that an actor was declared dead."""
    actor, generation = actor_generation(name)
    return {"kind": "FENCE", "actor": actor, "generation": generation}


def actor_generation(name: str) -> tuple[str, int]:
    """Split a name such as `rollout-0+2` into the actor and the number of its replacements."""
    match = re.fullmatch(r"(.*)\+(\d+)", name)
    return (match[1], int(match[2])) if match else (name, 0)


def actor_name(actor: str, generation: int) -> str:
    """Return the name of an actor's generation; the inverse of `actor_generation`."""
    return f"{actor}+{generation}" if generation else actor
