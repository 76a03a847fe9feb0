"""Plans micro-batches, and balances work by cost."""

from __future__ import annotations

from collections.abc import Sequence


def micro_batches(lengths: Sequence[int], max_tokens: int, *, packed: bool) -> list[list[int]]:
    """Group sequences, by index, into micro-batches of at most `max_tokens` tokens.

    If everything fits, returns one micro-batch in the given order. Otherwise `packed` ones contain no padding and cost
    about the same; padded ones are sorted by length, so that there is little padding. A sequence longer than
    `max_tokens` gets its own micro-batch.
    """
    if not lengths:
        return []
    size = sum(lengths) if packed else len(lengths) * max(lengths)
    if size <= max_tokens:
        return [list(range(len(lengths)))]
    return _packed(lengths, max_tokens) if packed else _sorted(lengths, max_tokens)


def _sorted(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    pieces: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: (lengths[index], index)):
        if pieces and (len(pieces[-1]) + 1) * lengths[index] <= max_tokens:
            pieces[-1].append(index)
        else:
            pieces.append([index])
    return pieces


def _packed(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Split into the smallest number of balanced micro-batches that fit."""
    num = -(-sum(lengths) // max_tokens)
    while True:
        pieces = balanced([cost(length) for length in lengths], num)
        if all(len(piece) == 1 or sum(lengths[index] for index in piece) <= max_tokens for piece in pieces):
            return pieces
        num += 1


ATTENTION_TOKENS = 24_576
"""The length at which causal attention costs as much as everything else in a model of hidden size 2,048."""


def cost(length: int) -> float:
    """Estimate the cost of computing a sequence, in tokens of a short one."""
    return length * (1 + length / ATTENTION_TOKENS)


def balanced(costs: Sequence[float], num: int) -> list[list[int]]:
    """Split indices into `num` lists of similar cost.

    Assigns the costliest first, each to the cheapest list so far. At most 4/3 of the optimum (Graham 1969). Each list
    keeps the given order. Empty lists are omitted.
    """
    totals, lists = [0.0] * num, [list[int]() for _ in range(num)]
    for index in sorted(range(len(costs)), key=lambda index: (-costs[index], index)):
        least = min(range(num), key=lambda place: (totals[place], place))
        totals[least] += costs[index]
        lists[least].append(index)
    return [sorted(indices) for indices in lists if indices]
