"""Loads tokenizers and pads token ids."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from cluster.data import tokenizer as tokenizers
from cluster.errors import InputError
from learner.model.actor_critic import require_model_folder


def load_tokenizer(path: Path) -> Any:
    """Load the tokenizer of a folder; it always has a padding token and pads on the right.

    Raises InputError if the folder is missing or its tokenizer has no end-of-sequence token.
    """
    require_model_folder(path)
    tokenizer = tokenizers.load_tokenizer(path)
    if tokenizer.eos_token_id is None:
        raise InputError(str(path), "its tokenizer has no end-of-sequence token")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    return tokenizer


def pad(sequences: Sequence[Sequence[int]], value: int) -> torch.Tensor:
    """Pad sequences on the right to the longest: [B, T]."""
    rows = [torch.tensor(ids, dtype=torch.long) for ids in sequences]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)
