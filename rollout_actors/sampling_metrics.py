"""What an engine thread counts. Knows no engine."""

from __future__ import annotations

from dataclasses import dataclass

from rollout_actors.engine import UNLOADED_VERSION


@dataclass(slots=True)
class SamplingMetrics:
    """Totals since the engine thread started; `busy_s` is time inside the engine's steps, swaps apart."""

    policy_version: int = UNLOADED_VERSION
    num_sampled_tokens: int = 0
    num_responses: int = 0
    busy_s: float = 0.0
    swap_s: float = 0.0
    num_swaps_proved: int = 0
    num_swaps_checksum_only: int = 0
    num_prefilled_again_tokens: int = 0
    prefill_again_s: float = 0.0
    """Steps in which a response interrupted by a swap had not sampled again yet: an upper bound."""
