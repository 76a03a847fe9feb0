"""Carries weights through Ray's object store: the learner puts each tensor once, actors fetch by reference.

A tensor travels as its raw bytes with dtype and shape in the manifest, so every dtype passes unchanged and the
checksum is over exactly what arrives.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np
import ray
import torch

from cluster.errors import WeightsRefused
from cluster.weights import Manifest, TensorEntry


def tensor_bytes(tensor: torch.Tensor) -> np.ndarray:
    """The tensor's bytes, as a flat uint8 array."""
    data: np.ndarray = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
    return data


def checksum(data: np.ndarray) -> str:
    """blake2b over raw bytes, 16 bytes in hexadecimal."""
    return hashlib.blake2b(np.ascontiguousarray(data).data, digest_size=16).hexdigest()


def put_tensors(tensors: Iterable[tuple[str, torch.Tensor]]) -> tuple[TensorEntry, ...]:
    """Put every tensor into the object store of this node; the entries keep them alive."""
    entries = []
    for name, tensor in tensors:
        data = tensor_bytes(tensor)
        dtype = str(tensor.dtype).removeprefix("torch.")
        entries.append(TensorEntry(name, tuple(tensor.shape), dtype, checksum(data), ray.put(data)))
    return tuple(entries)


def fetch_tensors(manifest: Manifest, *, timeout_s: float) -> dict[str, torch.Tensor]:
    """Every tensor of a version, whole and checked. Raises WeightsRefused naming a tensor that was altered."""
    arrays = ray.get([entry.reference for entry in manifest.tensors], timeout=timeout_s)
    return {
        entry.name: _to_tensor(entry, data, manifest.version)
        for entry, data in zip(manifest.tensors, arrays, strict=True)
    }


def _to_tensor(entry: TensorEntry, data: np.ndarray, version: int) -> torch.Tensor:
    if checksum(data) != entry.checksum:
        raise WeightsRefused(entry.name, f"the bytes of version {version} that arrived are not those published")
    return torch.from_numpy(data.copy()).view(getattr(torch, entry.dtype)).reshape(entry.shape)
