"""Computes rows that consist of several sequences, as conversations do whose history is rendered anew for each turn.

Shapes: B rows, T tokens of the longest, S sequences of all rows, U tokens of the longest sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor

from learner.model.indexing import at, on_device, places_of

Compute = Callable[[Tensor, Tensor, Sequence[int]], Sequence[Tensor]]
"""Computes outputs [S, U] of token ids and a mask [S, U] with sequences of these lengths; 0 if the mask is false."""


def by_sequence(
    compute: Compute, token_ids: Tensor, mask: Tensor, sequences: Sequence[Sequence[int]]
) -> Sequence[Tensor]:
    """Compute outputs [B, T] of rows, each of which is its sequences end to end, with these lengths."""
    if all(len(row) == 1 for row in sequences):
        return compute(token_ids, mask, [length for (length,) in sequences])
    lengths = [length for row in sequences for length in row]
    places, is_token = _places(sequences, token_ids.shape[1])
    index = on_device(places, token_ids.device)
    inside = on_device(is_token, token_ids.device)
    own_mask = mask.reshape(-1)[index] & inside
    outputs = compute(token_ids.reshape(-1)[index] * inside, own_mask, lengths)
    sampled = places_of(own_mask)
    return [values.new_zeros(mask.shape).masked_scatter(mask, at(sampled, values)) for values in outputs]


def _places(sequences: Sequence[Sequence[int]], width: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the flat place [S, U] of each sequence's tokens in the rows, 0 on padding, and which are tokens."""
    starts = [row * width + start for row, own in enumerate(sequences) for start in np.cumsum([0, *own[:-1]]).tolist()]
    lengths = np.array([length for row in sequences for length in row])
    offsets = np.arange(lengths.max())
    is_token = offsets < lengths[:, None]
    return (np.array(starts)[:, None] + offsets) * is_token, is_token
