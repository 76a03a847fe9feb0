"""Makes the manifest of a version: puts the policy's tensors for the actors, computes the probe.

Tensors never pass through the driver.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from cluster.weights.manifest import OBJECT_STORE, Manifest, Probe
from cluster.weights.transport import carrier
from learner.distributed.ranks import whole
from learner.model.actor_critic import ActorCritic
from learner.model.tensors import policy_tensors

NUM_PROBES = 4
MAX_PROBE_TOKENS = 24

ProbeTokens = Sequence[Sequence[int]]


def default_probe(config: Any, seed: int) -> tuple[tuple[int, ...], ...]:
    """Draw probe sequences from the whole vocabulary, so that any change of the weights affects them."""
    text = config.get_text_config()
    length = min(MAX_PROBE_TOKENS, text.max_position_embeddings)
    draw = random.Random(f"probe:{seed}")
    return tuple(tuple(draw.randrange(text.vocab_size) for _ in range(length)) for _ in range(NUM_PROBES))


class WeightPublisher:
    """Makes the manifests of the policy's versions, each with the probe of the version before.

    `incarnation` names the learner that trained them; another one may be assigned.
    """

    def __init__(
        self,
        model: ActorCritic,
        probe_token_ids: ProbeTokens,
        device: torch.device,
        dtype: str,
        incarnation: str,
        carrier_name: str = OBJECT_STORE,
    ) -> None:
        self.incarnation = incarnation
        self._model = model
        self._probe_token_ids = tuple(tuple(ids) for ids in probe_token_ids)
        self._device = device
        self._dtype = getattr(torch, dtype)
        self._previous: Probe | None = None
        self._carrier_name = carrier_name

    def publish(self, version: int, *, with_tensors: bool) -> Manifest:
        """Compute the probe and, if `with_tensors` (on one rank), hand the tensors to the carrier.

        Collective if the model is sharded: tensors are gathered one by one.
        """
        probe = probe_logprobs(self._model, self._probe_token_ids, self._device)
        previous, self._previous = self._previous, probe
        tensors = published_tensors(self._model.policy, self._dtype)
        entries = carrier(self._carrier_name).put(tensors) if with_tensors else _gathered(tensors)
        return Manifest(version, self.incarnation, entries, self._probe_token_ids, probe, previous, self._carrier_name)


def _gathered(tensors: Iterator[tuple[str, Tensor]]) -> tuple[()]:
    """Take part in gathering without keeping the tensors."""
    for _ in tensors:
        pass
    return ()


def published_tensors(model: Any, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Yield `policy_tensors`, and `lm_head.weight` even if it is tied.

    An engine that does not receive a tied head explicitly may silently keep its old one.
    """
    names = set()
    for name, tensor in policy_tensors(model, dtype):
        names.add(name)
        yield name, tensor
    if "lm_head.weight" not in names:
        yield "lm_head.weight", whole(model.get_output_embeddings().weight.detach()).to(dtype)


def probe_logprobs(model: ActorCritic, sequences: ProbeTokens, device: torch.device) -> list[list[float]]:
    """Compute each sequence's log-probabilities at temperature 1, without the first token."""
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
