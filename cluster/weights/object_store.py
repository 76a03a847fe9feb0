"""Move weights through Ray's object store: the learner puts each tensor once, actors fetch by reference.

A tensor travels as its raw bytes, with dtype and shape in the manifest: every dtype passes unchanged, and the checksum
is over exactly the bytes that arrive. Neighbouring tensors share an object (a bucket), because each object costs about
a millisecond.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import ray
import torch
from ray.exceptions import ObjectLostError

from cluster.errors import WeightsLost, WeightsRefused
from cluster.weights.manifest import Manifest, TensorEntry

BUCKET_BYTES = 64 * 2**20
"""Size at which a bucket is complete and the next one starts."""


class Slice(NamedTuple):
    """The place of a tensor's bytes: in the object `bucket`, from byte `start` to `stop`."""

    bucket: Any
    start: int
    stop: int


class ObjectStore:
    """The carrier "object_store"."""

    def put(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> tuple[TensorEntry, ...]:
        """Call `put_tensors`."""
        return put_tensors(tensors)

    def fetch(self, manifest: Manifest, *, timeout_s: float) -> dict[str, torch.Tensor]:
        """Call `fetch_tensors`."""
        return fetch_tensors(manifest, timeout_s=timeout_s)


def tensor_bytes(tensor: torch.Tensor) -> np.ndarray:
    """Return the tensor's bytes as a flat uint8 array."""
    data: np.ndarray = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
    return data


def checksum(data: np.ndarray) -> str:
    """Return blake2b over raw bytes: 16 bytes in hexadecimal."""
    return hashlib.blake2b(np.ascontiguousarray(data).data, digest_size=16).hexdigest()


def put_tensors(tensors: Iterable[tuple[str, torch.Tensor]]) -> tuple[TensorEntry, ...]:
    """Put every tensor into the object store of this node, bucket by bucket; the returned entries keep them alive."""
    entries = []
    for bucket in _buckets(tensors):
        reference = ray.put(np.concatenate([data for _, _, data in bucket]))
        stop = 0
        for name, tensor, data in bucket:
            start, stop = stop, stop + data.size
            dtype = str(tensor.dtype).removeprefix("torch.")
            entries.append(TensorEntry(name, tuple(tensor.shape), dtype, checksum(data), Slice(reference, start, stop)))
    return tuple(entries)


def _buckets(tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[list[tuple[str, torch.Tensor, np.ndarray]]]:
    """Yield the tensors with their bytes, in order, in lists of at least BUCKET_BYTES (the last may be smaller)."""
    bucket: list[tuple[str, torch.Tensor, np.ndarray]] = []
    size = 0
    for name, tensor in tensors:
        data = tensor_bytes(tensor)
        bucket.append((name, tensor, data))
        size += data.size
        if size >= BUCKET_BYTES:
            yield bucket
            bucket, size = [], 0
    if bucket:
        yield bucket


def fetch_tensors(manifest: Manifest, *, timeout_s: float) -> dict[str, torch.Tensor]:
    """Return every tensor of a version by name, with its checksum verified.

    Raises WeightsRefused naming a tensor that was altered, WeightsLost if the process that put them is gone.
    """
    references = list(dict.fromkeys(entry.reference.bucket for entry in manifest.tensors))
    try:
        buckets = dict(zip(references, ray.get(references, timeout=timeout_s), strict=True))
    except ObjectLostError as error:
        raise WeightsLost(f"version {manifest.version}", "its tensors were lost with their learner") from error
    return {
        entry.name: _to_tensor(entry, buckets[entry.reference.bucket], manifest.version) for entry in manifest.tensors
    }


def _to_tensor(entry: TensorEntry, bucket: np.ndarray, version: int) -> torch.Tensor:
    data = bucket[entry.reference.start : entry.reference.stop]
    if checksum(data) != entry.checksum:
        raise WeightsRefused(entry.name, f"the bytes of version {version} that arrived differ from those published")
    return torch.from_numpy(data.copy()).view(getattr(torch, entry.dtype)).reshape(entry.shape)
