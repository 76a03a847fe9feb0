"""Creates the optimiser, computes the gradients' norm and clips them.

Collective if the parameters are sharded.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from learner.distributed.ranks import whole


def make_adamw(parameters: Iterable[nn.Parameter], *, weight_decay: float = 0.0) -> torch.optim.Optimizer:
    """Create AdamW for the trainable parameters. Its user sets the learning rate of each step."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    return torch.optim.AdamW(trained, weight_decay=weight_decay, fused=True)


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Compute the norm [] of all gradients together."""
    return whole(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))


def clip_gradients(parameters: Iterable[nn.Parameter], norm: Tensor, max_norm: float) -> None:
    """Scale gradients, whose norm is `norm`, down to `max_norm` if it is larger."""
    scale = float(max_norm / (norm + 1e-6))
    if scale < 1:
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(scale)
