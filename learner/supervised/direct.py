"""Losses of direct preference optimisation, from log-probabilities of whole responses.

Shapes: B pairs or responses. A log-ratio is the log-probability under the policy less that under the reference.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def sigmoid_loss(chosen: Tensor, rejected: Tensor, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Compute DPO's loss [B] from log-ratios [B] (Rafailov et al. 2023, arXiv:2305.18290, eq. 7).

    With label smoothing e, its mean with that of the opposite preference, weighted 1 - e and e (Mitchell 2023, "A note
    on DPO with noisy preferences & relationship to IPO", eq. 3).
    """
    margins = beta * (chosen - rejected)
    loss = -F.logsigmoid(margins)
    if not label_smoothing:
        return loss
    return (1 - label_smoothing) * loss - label_smoothing * F.logsigmoid(-margins)


def ipo_loss(chosen: Tensor, rejected: Tensor, *, beta: float) -> Tensor:
    """Compute IPO's loss [B] from log-ratios [B] (Azar et al. 2023, arXiv:2310.12036, eq. 17, with beta as tau).

    The log-ratios are means over tokens, so that the loss does not depend on the responses' lengths. The paper does not
    say so; its authors confirmed it to TRL's.
    """
    return (chosen - rejected - 1 / (2 * beta)) ** 2


def kto_loss(
    ratios: Tensor,
    is_desirable: Tensor,
    kl: float,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """Compute KTO's loss [B] from log-ratios [B] (Ethayarajh et al. 2024, arXiv:2402.01306, eq. 8).

    `kl` is the reference point: the estimated KL from the policy to the reference, at least 0 and without gradient.
    """
    gains = torch.where(is_desirable, ratios - kl, kl - ratios)
    weights = torch.where(is_desirable, torch.full_like(ratios, desirable_weight), undesirable_weight)
    return weights * (1 - torch.sigmoid(beta * gains))
