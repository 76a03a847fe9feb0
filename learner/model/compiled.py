"""What is fused on a GPU, where memory traffic costs more than arithmetic: layers, and distributions over tokens.

Each kernel of PyTorch's reads and writes all it is given; compiled together, a norm is one kernel and a distribution
over the vocabulary two. On a CPU nothing is compiled, so that its numbers are bit for bit what they always were. Knows
neither losses nor ranks.

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
    """Have the model's layers compiled when they are first called, for any number of tokens; attention stays apart."""
    AttentionInterface.register(PACKED, torch.compiler.disable(packed_attention))
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.compile(dynamic=True, backend=backend)


def distributions(
    logits: Tensor, token_ids: Tensor, temperature: float, entropy_gradient: bool | None
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of tokens [N] and entropies [N] of logits [N, V] at a temperature, normalised in float32.

    `entropy_gradient`: None leaves entropies 0, false gives them no gradient.
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
    """The same function, compiled: the logits are kept for the backward pass in the numbers they came in."""
    compiled: Distributions = torch.compile(distributions, dynamic=True)
    return compiled


def entropy(logprobs: Tensor) -> Tensor:
    """Entropy in nats of each distribution; `logprobs` [..., V] are normalised over the vocabulary V."""
    return -(logprobs.exp() * logprobs).sum(-1)
