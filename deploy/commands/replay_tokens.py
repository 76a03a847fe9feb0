"""Samples a run's segments again, each from its seed, version and prefix, in batches of another make.

Knows the rollout actors and the log; whose weights a version holds is whoever calls `sample_again`'s affair.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cluster.actors.remote import RemoteActor
from cluster.errors import AntiphonError
from cluster.journal.history import History
from cluster.weights.manifest import Manifest
from rollout_actors.engine.protocol import SamplingRequest


@dataclass(frozen=True, slots=True)
class RecordedSegment:
    """What was sampled in one segment, and what is asked for to sample it again."""

    uid: str
    number: int
    token_ids: list[int]
    request: SamplingRequest


class TokenReplay:
    """The segments of the trajectories that were trained in `steps`, sampled again by all of `actors`."""

    def __init__(
        self,
        actors: Sequence[RemoteActor],
        history: History,
        *,
        steps: range,
        max_policy_lag: int,
        temperature: float,
    ) -> None:
        self._actors = actors
        self._history = history
        self._steps = steps
        self._max_policy_lag = max_policy_lag
        self._temperature = temperature
        self._num_segments = self._num_identical = 0
        self._num_tokens = self._num_identical_tokens = 0
        self._first_other = ""

    async def sample_again(self, manifest: Manifest) -> None:
        """Sample what was sampled with this version, in a drawn order, shared out among the actors."""
        segments = await asyncio.to_thread(lambda: list(self._segments(manifest.version)))
        random.Random(f"replay:{manifest.version}").shuffle(segments)
        shares = [segments[place :: len(self._actors)] for place in range(len(self._actors))]
        await asyncio.gather(*(actor.load_published(manifest) for actor in self._actors))
        answers = await asyncio.gather(
            *(
                actor.go_on([segment.request for segment in share])
                for actor, share in zip(self._actors, shares, strict=True)
            )
        )
        for share, sampled in zip(shares, answers, strict=True):
            for segment, token_ids in zip(share, sampled, strict=True):
                self._judge(segment, token_ids)

    def _segments(self, version: int) -> Iterator[RecordedSegment]:
        """What a version sampled: it is trained in the step after it, or as many later as the lag may be."""
        for step in range(version + 1, version + 2 + self._max_policy_lag):
            if step not in self._steps:
                continue
            for trajectory in (trajectory for group in self._history.groups(step) for trajectory in group):
                for number, segment in enumerate(trajectory.segments):
                    if segment.policy_version == version and segment.length:
                        prefix = trajectory.token_ids[: segment.start]
                        token_ids = trajectory.token_ids[segment.start : segment.start + segment.length]
                        request = SamplingRequest(
                            trajectory.uid, prefix, segment.length, segment.seed, self._temperature
                        )
                        yield RecordedSegment(trajectory.uid, number, token_ids, request)

    def _judge(self, segment: RecordedSegment, token_ids: Sequence[int]) -> None:
        num = len(segment.token_ids)
        same = next((i for i, (a, b) in enumerate(zip(segment.token_ids, token_ids, strict=False)) if a != b), num)
        same = min(same, len(token_ids))
        self._num_segments += 1
        self._num_tokens += num
        self._num_identical_tokens += same
        if same == num:
            self._num_identical += 1
        elif not self._first_other:
            self._first_other = f"segment {segment.number} of {segment.uid} from its token {same} on"

    def report(self) -> str:
        """The share that is token-identical."""
        segments = f"{self._num_identical:,} of {self._num_segments:,} segments"
        tokens = f"{self._num_identical_tokens:,} of {self._num_tokens:,} tokens up to the first other one"
        share = self._num_identical / max(1, self._num_segments)
        return f"sampled again: {share:.2%} token-identical ({segments}; {tokens})"

    def require_identical(self) -> None:
        """Raise AntiphonError naming a segment that is another one."""
        if self._first_other:
            num = self._num_segments - self._num_identical
            raise AntiphonError("tokens", f"{num:,} of {self._num_segments:,} segments differ, {self._first_other}")
