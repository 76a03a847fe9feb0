"""The reward model in training: a Hugging Face sequence classifier with one label.

The reward is read at a sequence's last token. Each sequence's reward equals that of transformers' model for the
sequence alone. Sequences are packed, or padded on the right, which causal attention ignores. There is no dropout.

Shapes: B sequences, N tokens of all, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from cluster.errors import InputError
from learner.model.actor_critic import checkpoint_activations, load_model, pack_attention, trunk_of_pack
from learner.model.tokenizer import load_tokenizer, pad


class RewardNet(nn.Module):
    """The trunk of a model folder with its head, or with a new head drawn by `seed`."""

    def __init__(self, path: Path, dtype: str, *, packing: bool, activation_checkpointing: bool, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        kept = "float64" if dtype == "float64" else "float32"
        self.model: Any = load_model(AutoModelForSequenceClassification, path, kept, num_labels=1)
        self.model.config.pad_token_id = load_tokenizer(path).pad_token_id
        if not isinstance(getattr(self.model, "score", None), nn.Linear):
            raise InputError(str(path), f"no reward model can be made of a {self.model.config.model_type} model")
        self._half = dtype == "bfloat16"
        self._packing = packing
        if packing:
            self._pack(path)
        if activation_checkpointing:
            checkpoint_activations(self.model)

    @torch.no_grad()
    def _pack(self, path: Path) -> None:
        probe = torch.arange(min(8, self.model.config.get_text_config().vocab_size))[None]
        pack_attention(self.model, path, probe, self.model.base_model(input_ids=probe, use_cache=False)[0])

    def forward(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """Compute the rewards [B] of sequences of token ids."""
        device = self.model.score.weight.device
        with torch.autocast(device.type, torch.bfloat16, enabled=self._half):
            hidden = self._hidden(sequences, device)
        rewards: Tensor = self.model.score(hidden.to(self.model.score.weight.dtype))
        return rewards[:, 0]

    def _hidden(self, sequences: Sequence[Sequence[int]], device: torch.device) -> Tensor:
        """Compute the hidden states [B, H] that rewards are read from."""
        lengths = [len(ids) for ids in sequences]
        lasts = torch.tensor([last_place(ids, self.model.config.pad_token_id) for ids in sequences])
        if self._packing:
            token_ids = torch.tensor([token_id for ids in sequences for token_id in ids])[None]
            starts = torch.tensor([0, *accumulate(lengths[:-1])])
            return trunk_of_pack(self.model.base_model, token_ids.to(device), lengths)[(starts + lasts).to(device)]
        token_ids = pad(sequences, 0).to(device)
        hidden: Tensor = self.model.base_model(input_ids=token_ids, use_cache=False).last_hidden_state
        return hidden[torch.arange(len(lengths)), lasts.to(device)]


def last_place(token_ids: Sequence[int], pad_token_id: int) -> int:
    """Return the index that transformers reads the reward at: the last non-padding token."""
    return next((place for place in reversed(range(len(token_ids))) if token_ids[place] != pad_token_id), 0)
