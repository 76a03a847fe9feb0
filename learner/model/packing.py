"""Packs sequences end to end without padding, with attention that keeps them apart.

All layers except attention treat tokens independently, so a pack is one long row; attention is within each sequence.
On a GPU in half precision this uses variable-length flash attention. Elsewhere, sequences of similar length are padded
and computed together by PyTorch's attention.

Shapes: S sequences, N tokens of all, A attention heads (K of keys and values), D their size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from cluster.errors import InputError
from learner.model.indexing import on_device

PACKED = "antiphon_packed"
MAX_LENGTH_RATIO = 1.25
"""Sequences of a bucket are at most this many times as long as its shortest one, or"""
MAX_LENGTH_DIFFERENCE = 8
"""at most this many tokens longer."""


class Bucket(NamedTuple):
    """Sequences of similar length, padded for attention only."""

    places: Tensor
    """[b * t]: index of the pack's token at this position; 0 on padding."""
    num: int
    width: int


@dataclass(frozen=True, slots=True)
class Pack:
    """The layout of sequences in one row of N tokens."""

    lengths: tuple[int, ...]
    positions: Tensor
    """[1, N]: each token's position in its own sequence."""
    ends: Tensor
    """[S + 1] int32: cumulative lengths."""
    buckets: tuple[Bucket, ...]
    places: Tensor | None
    """[N]: each token's position in the concatenated buckets; None if the only bucket is the pack itself."""


def make_pack(lengths: Sequence[int], device: torch.device) -> Pack:
    """Lay out sequences of these lengths, in this order."""
    starts = np.concatenate([[0], np.cumsum(lengths)])
    positions = np.concatenate([np.arange(length) for length in lengths])
    buckets, places, offset = [], np.zeros(starts[-1], np.int64), 0
    for rows in _buckets(lengths):
        width = max(lengths[row] for row in rows)
        index: np.ndarray = np.zeros((len(rows), width), np.int64)
        for number, row in enumerate(rows):
            tokens = np.arange(starts[row], starts[row + 1])
            index[number, : len(tokens)] = tokens
            places[tokens] = offset + number * width + np.arange(len(tokens))
        offset += index.size
        buckets.append(Bucket(on_device(index.reshape(-1), device), len(rows), width))
    is_unchanged = len(buckets) == 1 and offset == len(places)
    return Pack(
        tuple(lengths),
        on_device(positions, device)[None],
        on_device(starts.astype(np.int32), device),
        tuple(buckets),
        None if is_unchanged else on_device(places, device),
    )


def _buckets(lengths: Sequence[int]) -> list[list[int]]:
    """Group sequence numbers by similar length, shortest first; within a group they keep their order."""
    buckets: list[list[int]] = []
    shortest = 0
    for row in sorted(range(len(lengths)), key=lambda row: (lengths[row], row)):
        if buckets and lengths[row] <= max(MAX_LENGTH_RATIO * shortest, shortest + MAX_LENGTH_DIFFERENCE):
            buckets[-1].append(row)
        else:
            buckets.append([row])
            shortest = lengths[row]
    return [sorted(bucket) for bucket in buckets]


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    pack: Pack,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Compute causal attention within each sequence.

    From query [1, A, N, D], key and value [1, K, N, D] to [1, N, A, D]. An attention function of transformers. There is
    no dropout: learners stay in evaluation mode. Raises InputError if a sequence is longer than the model's sliding
    window.
    """
    if sliding_window is not None and max(pack.lengths) > sliding_window:
        problem = (
            f"the model's attention slides a window of {sliding_window} tokens over {max(pack.lengths)}: set it false"
        )
        raise InputError("learner.packing", problem)
    by_token = [tensor[0].transpose(0, 1) for tensor in (query, key, value)]
    if query.is_cuda and query.dtype in (torch.float16, torch.bfloat16):
        return _flash(by_token, pack, scaling), None
    outputs = [_attend(by_token, bucket, pack, scaling) for bucket in pack.buckets]
    flat = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return (flat if pack.places is None else flat.index_select(0, pack.places))[None], None


def _flash(by_token: list[Tensor], pack: Pack, scaling: float | None) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    query, key, value = (tensor.contiguous() for tensor in by_token)
    longest = max(pack.lengths)
    options: Any = {"scale": scaling, "window_size": (-1, 0), "enable_gqa": key.shape[1] != query.shape[1]}
    output: Any = varlen_attn(query, key, value, pack.ends, pack.ends, longest, longest, **options)
    return output[None]  # type: ignore[no-any-return]


def _attend(by_token: list[Tensor], bucket: Bucket, pack: Pack, scaling: float | None) -> Tensor:
    """Compute attention [b * t, A, D] of one bucket; values at its padding are undefined."""
    rows = by_token if pack.places is None else [tensor.index_select(0, bucket.places) for tensor in by_token]
    query, key, value = (row.unflatten(0, (bucket.num, bucket.width)).transpose(1, 2) for row in rows)
    grouped = key.shape[1] != query.shape[1]
    output = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=grouped)
    return output.transpose(1, 2).flatten(0, 1)


AttentionInterface.register(PACKED, packed_attention)
