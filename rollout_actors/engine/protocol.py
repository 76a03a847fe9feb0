"""The protocol of a generation engine. vLLM implements it; unit tests use a small fake.

One thread owns an engine: nothing here is thread-safe.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch


UNLOADED_VERSION = -1
"""Label of the weights that an engine starts with, before a version is loaded."""


@dataclass(frozen=True, slots=True)
class Truncation:
    """Which tokens may be sampled: the likeliest `top_k` (0: all), with `top_p` of the probability, or `min_p`.

    `min_p` is a share of the likeliest token's probability. The probabilities of the rest are normalised again.
    """

    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0


@dataclass(frozen=True, slots=True)
class SamplingRequest:
    """Continue `token_ids` by at most `max_tokens`, sampled with a separate generator seeded with `seed`."""

    id: str
    token_ids: list[int]
    max_tokens: int
    seed: int
    temperature: float
    truncation: Truncation = Truncation()


@dataclass(frozen=True, slots=True)
class Sampled:
    """New tokens of one request since the last step, with their log-probabilities.

    The log-probabilities are at the sampling temperature, over the tokens that may be sampled.
    `finish_reason` is `stop` (the last token is the end-of-sequence token), `length`, or None if unfinished.
    """

    id: str
    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str | None


class GenerationEngine(Protocol):
    """Samples tokens for many requests at once, one step at a time."""

    def add(self, request: SamplingRequest) -> None:
        """Add a request. Every `step` advances it. Raises InputError for one that can never be sampled."""

    def step(self) -> list[Sampled]:
        """Advance every active request by about one token and return the new tokens."""

    def abort(self, ids: Sequence[str]) -> None:
        """Cancel these requests. Nothing more is returned for them."""

    def has_work(self) -> bool:
        """Return whether a request is active."""

    def load(self, tensors: Mapping[str, torch.Tensor], *, version: int) -> None:
        """Replace all weights by a version in checkpoint form. No request may be active."""

    def logprobs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Return the log-probability of each token but the first given its prefix, at temperature 1."""

    def close(self) -> None:
        """Free memory and end processes."""
