"""Sequences end to end without padding: what a model is given, and the attention that keeps them apart.

Every layer but attention treats tokens one by one, so a pack is one long row; attention sees each sequence alone.
On a GPU in half precision that is variable-length flash attention, elsewhere sequences of like length are computed
together by PyTorch's own attention. Knows neither policies nor losses.

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
LIKE = 1.25
"""Sequences up to so many times longer than the shortest are computed together."""
NEAR = 8
"""Or longer by so many tokens."""


class Bucket(NamedTuple):
    """Sequences of like length, padded for attention alone."""

    places: Tensor
    """[b * t]: which token of the pack stands there; 0 on padding."""
    num: int
    width: int


@dataclass(frozen=True, slots=True)
class Pack:
    """Where sequences lie in one row of N tokens."""

    lengths: tuple[int, ...]
    positions: Tensor
    """[1, N]: each token's place in its own sequence."""
    ends: Tensor
    """[S + 1] int32: cumulated lengths."""
    buckets: tuple[Bucket, ...]
    places: Tensor | None
    """[N]: where the buckets, end to end, hold each token; None where they hold the pack as it is."""


def make_pack(lengths: Sequence[int], device: torch.device) -> Pack:
    """The pack of sequences with these lengths, in this order."""
    starts = np.concatenate([[0], np.cumsum(lengths)])
    positions = np.concatenate([np.arange(length) for length in lengths])
    buckets, places, offset = [], np.zeros(starts[-1], np.int64), 0
    for rows in _alike(lengths):
        width = max(lengths[row] for row in rows)
        index: np.ndarray = np.zeros((len(rows), width), np.int64)
        for number, row in enumerate(rows):
            tokens = np.arange(starts[row], starts[row + 1])
            index[number, : len(tokens)] = tokens
            places[tokens] = offset + number * width + np.arange(len(tokens))
        offset += index.size
        buckets.append(Bucket(on_device(index.reshape(-1), device), len(rows), width))
    as_it_is = len(buckets) == 1 and offset == len(places)
    return Pack(
        tuple(lengths),
        on_device(positions, device)[None],
        on_device(starts.astype(np.int32), device),
        tuple(buckets),
        None if as_it_is else on_device(places, device),
    )


def _alike(lengths: Sequence[int]) -> list[list[int]]:
    """Sequence numbers by like length, the shortest first; all in order where all are alike."""
    buckets: list[list[int]] = []
    shortest = 0
    for row in sorted(range(len(lengths)), key=lambda row: (lengths[row], row)):
        if buckets and lengths[row] <= max(LIKE * shortest, shortest + NEAR):
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
    """Causal attention within each sequence: query [1, A, N, D], key and value [1, K, N, D] to [1, N, A, D].

    Has the form of transformers' attention functions. Dropout is left out: learners stay in evaluation mode. Raises
    InputError where a sequence is longer than a window that the model's attention would slide over it.
    """
    if sliding_window is not None and max(pack.lengths) > sliding_window:
        what = (
            f"the model's attention slides a window of {sliding_window} tokens over {max(pack.lengths)}: set it false"
        )
        raise InputError("learner.packing", what)
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
    """[b * t, A, D] of one bucket; what stands at its padding means nothing."""
    rows = by_token if pack.places is None else [tensor.index_select(0, bucket.places) for tensor in by_token]
    query, key, value = (row.unflatten(0, (bucket.num, bucket.width)).transpose(1, 2) for row in rows)
    grouped = key.shape[1] != query.shape[1]
    output = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=grouped)
    return output.transpose(1, 2).flatten(0, 1)


AttentionInterface.register(PACKED, packed_attention)
