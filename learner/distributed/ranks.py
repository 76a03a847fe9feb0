"""What the ranks of a learner group tell each other: sums, maxima, gradients, and that one of them failed.

Knows nothing of PPO. With one rank every method is the identity and `torch.distributed` is not touched.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from cluster.errors import LearnerError

BUCKET_ELEMENTS = 2**25


class StoppedWithPeer(LearnerError):
    """This rank stopped because another failed; that one's error says why."""


class Ranks:
    """This process's place among the ranks of its group."""

    def __init__(self, device: torch.device, *, distributed: bool) -> None:
        self._device = device
        self.size = dist.get_world_size() if distributed else 1
        self.rank = dist.get_rank() if distributed else 0

    def all_sum(self, tensor: Tensor) -> Tensor:
        """The sum over ranks; waits for all of them."""
        return self._reduced(tensor, dist.ReduceOp.SUM)

    def all_max(self, tensor: Tensor) -> Tensor:
        """The element-wise maximum over ranks; waits for all of them."""
        return self._reduced(tensor, dist.ReduceOp.MAX)

    def _reduced(self, tensor: Tensor, operation: dist.ReduceOp) -> Tensor:
        if self.size == 1:
            return tensor
        reduced = tensor.detach().to(self._device, copy=True)
        dist.all_reduce(reduced, op=operation)
        return reduced

    @contextmanager
    def agreed(self) -> Iterator[None]:
        """Leave the block on all ranks or on none: an error on one rank is an error on all.

        A small all-reduce at the end of the block, so that no rank waits in a large one for a rank that gave up.
        Raises the block's own error, or StoppedWithPeer where another rank's block raised.
        """
        failed = 1.0
        try:
            yield
            failed = 0.0
        finally:
            num_failed = float(self.all_sum(torch.tensor(failed)))
        if num_failed:
            raise StoppedWithPeer(f"learner rank {self.rank}", f"stopped with {num_failed:g} other ranks")

    def sum_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Replace every gradient by its sum over ranks, bucket by bucket; a missing one counts as zeros.

        Gradients in shards are summed by the backward pass already.
        """
        if self.size == 1:
            return
        bucket: list[Tensor] = []
        for parameter in parameters:
            if isinstance(parameter, DTensor):
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            bucket.append(parameter.grad)
            if sum(gradient.numel() for gradient in bucket) >= BUCKET_ELEMENTS:
                self._sum_bucket(bucket)
                bucket = []
        if bucket:
            self._sum_bucket(bucket)

    def _sum_bucket(self, gradients: list[Tensor]) -> None:
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        dist.all_reduce(flat)
        for gradient, summed in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(summed.view_as(gradient))


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, or all of one that lies in shards: then every rank must call, and waits for the others."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
