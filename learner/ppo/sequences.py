"""Computes rows that consist of several sequences, as conversations do whose history is rendered anew for each turn.

Shapes: B rows, T tokens of the longest, S sequences of all rows, U tokens of the longest sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from learner.model.indexing import at, on_device, places_of

Compute = Callable[[Tensor, Tensor, Sequence[int]], Sequence[Tensor]]
"""Computes outputs [S, U] of token ids and a mask [S, U] with sequences of these lengths; 0 if the mask is false."""


def by_sequence(
    compute: Compute,
    token_ids: Tensor,
    mask: Tensor,
    sequences: Sequence[Sequence[int]],
    *,
    max_tokens: int | None = None,
) -> Sequence[Tensor]:
    """Compute outputs [B, T] of rows, each of which is its sequences end to end, with these lengths.

    Sequences of more than `max_tokens` tokens together are computed one part after another, and again in the backward
    pass, so that a long conversation needs the memory of one part.
    """
    if all(len(row) == 1 for row in sequences):
        return compute(token_ids, mask, [length for (length,) in sequences])
    starts, lengths = _spans(sequences, token_ids.shape[1])
    parts = list(_parts(lengths, max_tokens))
    found = []
    for part in parts:
        own_ids, own_mask = _cut(token_ids, mask, starts[part], lengths[part])
        if len(parts) > 1 and torch.is_grad_enabled():
            outputs = checkpoint(compute, own_ids, own_mask, lengths[part].tolist(), use_reentrant=False)
        else:
            outputs = compute(own_ids, own_mask, lengths[part].tolist())
        sampled = places_of(own_mask)
        found.append([at(sampled, values) for values in outputs])
    together = [torch.cat(values) for values in zip(*found, strict=True)]
    return [values.new_zeros(mask.shape).masked_scatter(mask, values) for values in together]


def _spans(sequences: Sequence[Sequence[int]], width: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the flat place of each sequence's first token in rows of this width, and the lengths [S]."""
    starts = [row * width + start for row, own in enumerate(sequences) for start in np.cumsum([0, *own[:-1]]).tolist()]
    return np.array(starts), np.array([length for row in sequences for length in row])


def _parts(lengths: np.ndarray, max_tokens: int | None) -> Iterator[slice]:
    """Yield consecutive sequences that have at most `max_tokens` tokens together; a longer one is alone."""
    first, total = 0, 0
    for number, length in enumerate(lengths.tolist()):
        if max_tokens is not None and number > first and total + length > max_tokens:
            yield slice(first, number)
            first, total = number, 0
        total += length
    yield slice(first, len(lengths))


def _cut(token_ids: Tensor, mask: Tensor, starts: np.ndarray, lengths: np.ndarray) -> tuple[Tensor, Tensor]:
    """Return token ids and mask [S, U] of the sequences with these flat places and lengths; 0 on padding."""
    offsets = np.arange(lengths.max())
    is_token = offsets < lengths[:, None]
    index = on_device((starts[:, None] + offsets) * is_token, token_ids.device)
    inside = on_device(is_token, token_ids.device)
    return token_ids.reshape(-1)[index] * inside, mask.reshape(-1)[index] & inside
