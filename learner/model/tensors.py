"""Lists the policy's tensors by their names in a model folder."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from learner.distributed.ranks import whole
from learner.model.lora import merged


def policy_tensors(model: Any, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Yield the policy's whole tensors by name, with adapters merged, without a tied head."""
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor is None or id(tensor) in seen:
            continue
        seen.add(id(tensor))
        item = merged(name, whole(tensor.detach()), model)
        if item is not None:
            plain, full = item
            yield plain, full.to(dtype) if full.is_floating_point() else full
