"""Indices made on the CPU that a device needs, sent without waiting for what the device is at.

A GPU that is waited for stands still until more work is launched: with small models that is a third of a step.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def on_device(values: np.ndarray | Sequence[int], device: torch.device) -> Tensor:
    """The values as a tensor on the device."""
    tensor = torch.as_tensor(values)
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def places_of(mask: Tensor) -> Tensor:
    """[N]: where the mask [B, T] is true, in a row of B * T. Waits for the device, once for all that `at` picks."""
    return mask.reshape(-1).nonzero()[:, 0]


def at(places: Tensor, values: Tensor) -> Tensor:
    """[N, ...]: what stands at these places of values [B, T, ...]; the same as indexing by the mask."""
    return values.flatten(0, 1).index_select(0, places)
