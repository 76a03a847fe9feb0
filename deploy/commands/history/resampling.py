"""Sample a run's segments again from their seeds, versions and prefixes, in other batches.

The caller of `sample_again` provides the weights of each version.
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
    """The tokens of one segment and the request that samples it again."""

    uid: str
    number: int
    token_ids: list[int]
    request: SamplingRequest


class TokenReplay:
    """Samples the segments of the trajectories of `steps` again with all `actors` and counts equal tokens."""

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
        self._first_difference = ""

    async def sample_again(self, manifest: Manifest) -> None:
        """Sample the segments of this version again, in random order, split among the actors."""
        segments = await asyncio.to_thread(lambda: list(self._segments(manifest.version)))
        random.Random(f"replay:{manifest.version}").shuffle(segments)
        shares = [segments[first :: len(self._actors)] for first in range(len(self._actors))]
        await asyncio.gather(*(actor.load_published(manifest) for actor in self._actors))
        answers = await asyncio.gather(
            *(
                actor.complete([segment.request for segment in share])
                for actor, share in zip(self._actors, shares, strict=True)
            )
        )
        for share, sampled in zip(shares, answers, strict=True):
            for segment, token_ids in zip(share, sampled, strict=True):
                self._compare(segment, token_ids)

    def _segments(self, version: int) -> Iterator[RecordedSegment]:
        """Yield the segments of a version. They are trained in the next step or up to the maximum lag later."""
        for step in range(version + 1, version + 2 + self._max_policy_lag):
            if step not in self._steps:
                continue
            for trajectory in (trajectory for group in self._history.groups(step) for trajectory in group):
                for number, segment in enumerate(trajectory.segments):
                    if segment.policy_version == version and segment.length:
                        prefix = trajectory.tokens_before(segment.start)
                        token_ids = trajectory.token_ids[segment.start : segment.start + segment.length]
                        request = SamplingRequest(
                            trajectory.uid, prefix, segment.length, segment.seed, self._temperature
                        )
                        yield RecordedSegment(trajectory.uid, number, token_ids, request)

    def _compare(self, segment: RecordedSegment, token_ids: Sequence[int]) -> None:
        num = len(segment.token_ids)
        same = next((i for i, (a, b) in enumerate(zip(segment.token_ids, token_ids, strict=False)) if a != b), num)
        same = min(same, len(token_ids))
        self._num_segments += 1
        self._num_tokens += num
        self._num_identical_tokens += same
        if same == num:
            self._num_identical += 1
        elif not self._first_difference:
            self._first_difference = f"segment {segment.number} of {segment.uid} from its token {same}"

    def report(self) -> str:
        """Return a line with the share of token-identical segments."""
        segments = f"{self._num_identical:,} of {self._num_segments:,} segments"
        tokens = f"{self._num_identical_tokens:,} of {self._num_tokens:,} tokens before the first difference"
        share = self._num_identical / max(1, self._num_segments)
        return f"sampled again: {share:.2%} token-identical ({segments}; {tokens})"

    def require_identical(self) -> None:
        """Raise AntiphonError naming the first segment that differs."""
        if self._first_difference:
            differing = f"{self._num_segments - self._num_identical:,} of {self._num_segments:,} segments"
            raise AntiphonError("tokens", f"{differing} differ, the first is {self._first_difference}")
