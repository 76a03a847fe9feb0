"""Communication between the ranks of a learner group: sums, maxima, gradients, and failures.

With one rank every method is the identity and `torch.distributed` is not used.
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
    """Raised by a rank that stopped because another rank failed; the other rank's error is the cause."""


class Ranks:
    """This process's rank and the size of its group."""

    def __init__(self, device: torch.device, *, distributed: bool) -> None:
        self._device = device
        self.size = dist.get_world_size() if distributed else 1
        self.rank = dist.get_rank() if distributed else 0

    def all_sum(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over ranks. Collective."""
        return self._reduced(tensor, dist.ReduceOp.SUM)

    def all_max(self, tensor: Tensor) -> Tensor:
        """Compute the element-wise maximum over ranks. Collective."""
        return self._reduced(tensor, dist.ReduceOp.MAX)

    def _reduced(self, tensor: Tensor, operation: dist.ReduceOp) -> Tensor:
        if self.size == 1:
            return tensor
        reduced = tensor.detach().to(self._device, copy=True)
        dist.all_reduce(reduced, op=operation)
        return reduced

    @contextmanager
    def agreed(self) -> Iterator[None]:
        """Raise on every rank if the block raised on any rank. Collective.

        A small all-reduce at the end of the block keeps ranks from waiting in a later one for a rank that gave up.
        Raises the block's own error, or StoppedWithPeer if another rank's block raised.
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
        """Replace every gradient by its sum over ranks, bucket by bucket; a missing gradient counts as zeros.

        Sharded gradients are skipped: the backward pass has summed them.
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
    """Return the whole tensor; collective if it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
