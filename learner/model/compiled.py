"""Compiles layers and token distributions on a GPU, where memory traffic is the bottleneck.

Each uncompiled kernel reads and writes its whole input; compiled, a norm is one kernel and a distribution over the
vocabulary two. On a CPU nothing is compiled, so that its results stay the same bit for bit.

Shapes: N tokens, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_layers import GradientCheckpointingLayer

from learner.model.packing import PACKED, packed_attention

Distributions = Callable[[Tensor, Tensor, float, bool | None], tuple[Tensor, Tensor]]


def fuse_layers(model: nn.Module, backend: str | Callable[..., Any] = "inductor") -> None:
    """Compile the model's layers on their first call, for any number of tokens.

    Attention is not compiled.
    """
    AttentionInterface.register(PACKED, torch.compiler.disable(packed_attention))
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.compile(dynamic=True, backend=backend)


def distributions(
    logits: Tensor, token_ids: Tensor, temperature: float, entropy_gradient: bool | None
) -> tuple[Tensor, Tensor]:
    """Compute log-probabilities of tokens [N] and entropies [N] from logits [N, V] at a temperature.

    Normalised in float32. `entropy_gradient`: with None entropies are 0, with false they have no gradient.
    """
    if logits.dtype != torch.float64:
        logits = logits.float()
    logprobs = torch.log_softmax(logits / temperature, dim=-1)
    chosen = logprobs.gather(-1, token_ids[:, None])[:, 0]
    if entropy_gradient is None:
        return chosen, torch.zeros_like(chosen)
    return chosen, entropy(logprobs if entropy_gradient else logprobs.detach())


@functools.cache
def fused_distributions() -> Distributions:
    """Return `distributions` compiled; it keeps the logits for the backward pass in their own dtype."""
    compiled: Distributions = torch.compile(distributions, dynamic=True)
    return compiled


def entropy(logprobs: Tensor) -> Tensor:
    """Compute each distribution's entropy in nats.

    `logprobs` [..., V] are normalised over the vocabulary V.
    """
    return -(logprobs.exp() * logprobs).sum(-1)
