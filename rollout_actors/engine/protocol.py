"""The seam between sampling and whatever generates tokens. One thread owns an engine; nothing here is thread-safe.

vLLM stands behind it everywhere; unit tests put a small fake there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch


UNLOADED_VERSION = -1
"""Label of the weights that an engine was started from, before any version was loaded."""


@dataclass(frozen=True, slots=True)
class SamplingRequest:
    """Continue `token_ids` by at most `max_tokens`, sampled with a generator of its own started at `seed`."""

    id: str
    token_ids: list[int]
    max_tokens: int
    seed: int
    temperature: float


@dataclass(frozen=True, slots=True)
class Sampled:
    """New tokens of one request since the last step, each with its log-probability at the sampling temperature.

    `finish_reason` is `stop` (the end-of-sequence token is the last of the tokens), `length`, or None: still going.
    """

    id: str
    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str | None


class GenerationEngine(Protocol):
    """What the engine thread needs."""

    def add(self, request: SamplingRequest) -> None:
        """Take a request; it advances with every `step`."""

    def step(self) -> list[Sampled]:
        """Advance every request under way by about one token and return what is new."""

    def abort(self, ids: Sequence[str]) -> None:
        """Forget these requests; nothing more is returned for them."""

    def has_work(self) -> bool:
        """Whether a request is under way."""

    def load(self, tensors: Mapping[str, torch.Tensor], *, version: int) -> None:
        """Replace all weights by a whole version in checkpoint form. No request may be under way."""

    def logprobs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-probabilities, at temperature 1, of each sequence's tokens given their prefix, the first left out."""

    def close(self) -> None:
        """Give back memory and processes."""
