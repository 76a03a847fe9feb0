"""What a rank contributes to a manifest: the policy's tensors, put where actors can fetch them, and the probe.

The driver joins version and incarnation to it; tensors never pass through the driver. Knows neither PPO nor the
weight store.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cluster.weights.manifest import Manifest, Probe, TensorEntry
from cluster.weights.object_store import put_tensors
from learner.distributed.ranks import whole
from learner.model.actor_critic import ActorCritic
from learner.model.tensors import policy_tensors

NUM_PROBES = 4
MAX_PROBE_TOKENS = 24

ProbeTokens = Sequence[Sequence[int]]


@dataclass(frozen=True, slots=True)
class Publication:
    """A version as the learner's first rank gives it."""

    version: int
    tensors: tuple[TensorEntry, ...]
    probe_token_ids: tuple[tuple[int, ...], ...]
    probe: Probe
    previous_probe: Probe | None

    def manifest(self, incarnation: str) -> Manifest:
        """What is published of it."""
        return Manifest(self.version, incarnation, self.tensors, self.probe_token_ids, self.probe, self.previous_probe)


def default_probe(config: Any, seed: int) -> tuple[tuple[int, ...], ...]:
    """Token sequences drawn from a model's whole vocabulary: any text moves when the weights do."""
    text = config.get_text_config()
    length = min(MAX_PROBE_TOKENS, text.max_position_embeddings)
    draw = random.Random(f"probe:{seed}")
    return tuple(tuple(draw.randrange(text.vocab_size) for _ in range(length)) for _ in range(NUM_PROBES))


class WeightPublisher:
    """Makes a publication of the policy each time it is asked, with the probe of the version before."""

    def __init__(self, model: ActorCritic, probe_token_ids: ProbeTokens, device: torch.device, dtype: str) -> None:
        self._model = model
        self._probe_token_ids = tuple(tuple(ids) for ids in probe_token_ids)
        self._device = device
        self._dtype = getattr(torch, dtype)
        self._previous: Probe | None = None

    def publish(self, version: int, *, with_tensors: bool) -> Publication:
        """Compute the probe, and put the tensors into the object store where `with_tensors` says so (one rank).

        Every rank calls where the model lies in shards: tensors are gathered one by one.
        """
        probe = probe_logprobs(self._model, self._probe_token_ids, self._device)
        previous, self._previous = self._previous, probe
        tensors = published_tensors(self._model.policy, self._dtype)
        entries = put_tensors(tensors) if with_tensors else _gathered(tensors)
        return Publication(version, entries, self._probe_token_ids, probe, previous)


def _gathered(tensors: Iterator[tuple[str, Tensor]]) -> tuple[()]:
    """Take part in gathering, and keep nothing."""
    for _ in tensors:
        pass
    return ()


def published_tensors(model: Any, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """`policy_tensors`, and `lm_head.weight` even where it is tied.

    An engine that was not sent a tied head explicitly may silently keep its old one.
    """
    names = set()
    for name, tensor in policy_tensors(model, dtype):
        names.add(name)
        yield name, tensor
    if "lm_head.weight" not in names:
        yield "lm_head.weight", whole(model.get_output_embeddings().weight.detach()).to(dtype)


def probe_logprobs(model: ActorCritic, sequences: ProbeTokens, device: torch.device) -> list[list[float]]:
    """Log-probabilities, at temperature 1, of each sequence's tokens given their prefix, the first left out."""
    lengths = [max(2, len(ids)) for ids in sequences]
    width = max(lengths, default=0)
    token_ids = torch.zeros(len(sequences), width, dtype=torch.long)
    mask = torch.zeros(len(sequences), width, dtype=torch.bool)
    for row, ids in enumerate(sequences):
        token_ids[row, : len(ids)] = torch.tensor(ids)
        mask[row, 1 : len(ids)] = True
    if not sequences:
        return []
    with torch.no_grad():
        outputs = model(token_ids.to(device), mask.to(device), lengths, logprobs_only=True, temperature=1.0)
    return [row[1 : len(ids)].tolist() for row, ids in zip(outputs.logprobs.cpu(), sequences, strict=True)]
