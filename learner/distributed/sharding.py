"""Tensors in shards (FSDP2, arXiv:2304.11277): who holds which rows, and the model cut up so.

A tensor is cut along its first dimension into as many equal parts as there are ranks, the last ones shorter or empty.
Everything here takes ordinary tensors as well: they lie whole on every rank. Knows neither PPO nor files.
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
    """Cut the model up among the ranks, layer by layer; every rank calls.

    From then on it is called through its `forward` alone, on every rank alike, and its gradients are sums over ranks.
    `half` gathers weights in bfloat16 (gradients are summed in float32), but for the modules named in `heads`.
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
    """What of the tensor lies on this rank."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def first_row(tensor: Tensor) -> int:
    """Which row of the whole tensor the local part begins with."""
    if not isinstance(tensor, DTensor):
        return 0
    size = -(-tensor.shape[0] // tensor.device_mesh.size())
    return int(min(size * tensor.device_mesh.get_local_rank(), tensor.shape[0]))


def is_sharded(model: nn.Module) -> bool:
    """Whether ranks hold shards of the model, so that they must call it in step."""
    return isinstance(model, FSDPModule)
