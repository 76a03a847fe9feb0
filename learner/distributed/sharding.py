"""Shards models over ranks (FSDP2, arXiv:2304.11277) and finds which rows of a tensor a rank holds.

A tensor is split along its first dimension into one equal part per rank; the last parts may be shorter or empty. All
functions also take ordinary tensors, which every rank holds whole.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers.modeling_layers import GradientCheckpointingLayer


def shard(model: nn.Module, num_ranks: int, device: torch.device, *, half: bool, heads: tuple[str, ...] = ()) -> None:
    """Shard the model over the ranks, layer by layer. Collective.

    Afterwards call only its `forward`, on every rank; its gradients are sums over ranks. `half` gathers weights in
    bfloat16 (gradients are summed in float32), except in the modules named in `heads`.
    """
    mesh = init_device_mesh(device.type, (num_ranks,))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    options: dict[str, Any] = {"mesh": mesh, "reshard_after_forward": True, **({"mp_policy": policy} if half else {})}
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            fully_shard(module, **options)
    for name in heads:
        fully_shard(model.get_submodule(name), mesh=mesh, reshard_after_forward=True)
    fully_shard(model, **options)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part of the tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def first_row(tensor: Tensor) -> int:
    """Return the index, in the whole tensor, of the local part's first row."""
    if not isinstance(tensor, DTensor):
        return 0
    size = -(-tensor.shape[0] // tensor.device_mesh.size())
    return int(min(size * tensor.device_mesh.get_local_rank(), tensor.shape[0]))


def is_sharded(model: nn.Module) -> bool:
    """Whether the model is sharded, so that ranks must call it together."""
    return isinstance(model, FSDPModule)
