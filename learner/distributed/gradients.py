"""What becomes of gradients once they are complete: their norm, the clip to a norm, and the optimiser they are for.

Tensors may lie in shards; then every rank calls. Knows neither losses nor the other ranks.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from learner.distributed.ranks import whole


def make_adamw(parameters: Iterable[nn.Parameter], *, weight_decay: float = 0.0) -> torch.optim.Optimizer:
    """AdamW for all that is trained of these; whoever steps sets its learning rate."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    return torch.optim.AdamW(trained, weight_decay=weight_decay, fused=True)


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """The norm [] of all their gradients together."""
    return whole(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))


def clip_gradients(parameters: Iterable[nn.Parameter], norm: Tensor, max_norm: float) -> None:
    """Scale gradients of that norm down to `max_norm` where they are above it."""
    scale = float(max_norm / (norm + 1e-6))
    if scale < 1:
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(scale)
