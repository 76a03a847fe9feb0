"""Scores with a trained reward model: any Hugging Face sequence classifier with one label, read from a folder.

Knows nothing of how it was trained. A score changes in its last bits (1e-7 in fp32) with the batch it is in.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from cluster.chat_template import scored_token_ids
from cluster.errors import InputError, RewardError
from cluster.scoring import Score, ScoreRequest
from reward_service.batching import Batcher
from reward_service.config import REWARD_MODEL
from reward_service.scorer import Outcome, digest_files


class RewardModelScorer:
    """Reads `prompt + response + eos` and answers the model's one logit; concurrent calls share forward passes.

    Raises InputError when the folder holds no model of one label. A text longer than the model's context is an
    error naming the item, never cut.
    """

    name = REWARD_MODEL

    def __init__(self, folder: Path, *, max_batch_size: int = 256) -> None:
        weights = sorted(folder.glob("*.safetensors"))
        if not weights:
            raise InputError(REWARD_MODEL, f"no safetensors in {folder}")
        self.version = f"{REWARD_MODEL}@{digest_files(weights)}"
        self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        self._tokenizer.padding_side = "right"
        model = AutoModelForSequenceClassification.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, use_safetensors=True
        )
        self._check(model, folder)
        self._model = model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
        self._max_tokens = getattr(model.config, "max_position_embeddings", None) or math.inf
        self._batcher: Batcher[ScoreRequest, Outcome] = Batcher(self.score_batch, max_batch_size=max_batch_size)

    def _check(self, model: torch.nn.Module, folder: Path) -> None:
        if model.config.num_labels != 1:
            raise InputError(REWARD_MODEL, f"{folder} has {model.config.num_labels} labels; a reward model has one")
        if model.config.pad_token_id is None or self._tokenizer.pad_token_id is None:
            raise InputError(REWARD_MODEL, f"{folder} names no padding token")
        if self._tokenizer.eos_token is None:
            raise InputError(REWARD_MODEL, f"the tokenizer of {folder} has no end-of-sequence token")

    async def score(self, requests: Sequence[ScoreRequest]) -> list[Outcome]:
        return await self._batcher.run(requests)

    def score_batch(self, requests: Sequence[ScoreRequest]) -> list[Outcome]:
        """One forward pass over all requests that fit the model's context, padded on the right."""
        texts = [request.prompt + request.response + self._tokenizer.eos_token for request in requests]
        token_ids = scored_token_ids(self._tokenizer, texts)
        fitting = [i for i, ids in enumerate(token_ids) if len(ids) <= self._max_tokens]
        outcomes: list[Outcome] = [
            RewardError(self.name, f"{request.id} has {len(ids)} tokens; the model reads at most {self._max_tokens}")
            for request, ids in zip(requests, token_ids, strict=True)
        ]
        for i, reward in zip(fitting, self._forward([token_ids[i] for i in fitting]), strict=True):
            outcomes[i] = self._outcome(requests[i], reward)
        return outcomes

    def _forward(self, token_ids: list[list[int]]) -> list[float]:
        if not token_ids:
            return []
        batch = self._tokenizer.pad({"input_ids": token_ids}, return_tensors="pt").to(self._model.device)
        with torch.inference_mode():
            logits = self._model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return [float(reward) for reward in logits[:, 0].float().cpu()]

    def _outcome(self, request: ScoreRequest, reward: float) -> Outcome:
        if not math.isfinite(reward):
            return RewardError(self.name, f"{self.version} gave {reward} for {request.id}, not a finite number")
        return Score(request.id, reward, {REWARD_MODEL: reward}, self.version)
