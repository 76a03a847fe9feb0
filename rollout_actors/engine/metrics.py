"""Counters and time spans of an engine thread."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from rollout_actors.engine.protocol import UNLOADED_VERSION

MAX_INTERVALS = 4096
SAME_INTERVAL_S = 0.02


@dataclass(slots=True)
class SamplingMetrics:
    """Totals since the engine thread started. `busy_s` is the time in the engine's steps, without swaps."""

    policy_version: int = UNLOADED_VERSION
    num_sampled_tokens: int = 0
    num_responses: int = 0
    busy_s: float = 0.0
    swap_s: float = 0.0
    num_swaps_proved: int = 0
    num_swaps_checksum_only: int = 0
    num_prefilled_again_tokens: int = 0
    prefill_again_s: float = 0.0
    """Upper bound: all steps in which a response that a swap interrupted is being prefilled."""


class Intervals:
    """Collects the spans (policy version, start, end) in which tokens were sampled, in monotonic seconds.

    Merges spans less than SAME_INTERVAL_S apart. Keeps the newest MAX_INTERVALS.
    """

    def __init__(self) -> None:
        self._spans: deque[tuple[int, float, float]] = deque(maxlen=MAX_INTERVALS)

    def add(self, version: int, started: float, ended: float) -> None:
        """Add the span of one step."""
        last = self._spans[-1] if self._spans else None
        if last is not None and last[0] == version and started - last[2] < SAME_INTERVAL_S:
            self._spans[-1] = (version, last[1], ended)
        else:
            self._spans.append((version, started, ended))

    def take(self) -> list[tuple[int, float, float]]:
        """Return all spans and clear them."""
        spans = list(self._spans)
        self._spans.clear()
        return spans
