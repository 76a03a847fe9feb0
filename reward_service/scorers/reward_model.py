"""Scores with a trained reward model: a Hugging Face sequence classifier with one label.

Ensemble members are the folders `member-1`, `member-2`, ... inside the folder of the main model, which is a member
too and whose tokenizer they share. A score may differ in its last bits (1e-7 in fp32) with the batch it is in.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForSequenceClassification

from cluster.data.chat_template import render, require_template
from cluster.data.text_tokens import scored_token_ids
from cluster.data.tokenizer import load_tokenizer
from cluster.errors import InputError, RewardError
from cluster.scoring import Outcome, Score, ScoreRequest
from reward_service.config.service import REWARD_MODEL
from reward_service.scorers.batching import Batcher
from reward_service.scorers.files import member_folders, weights_digest

UNCERTAINTY, MESSAGES = "uncertainty", "messages"


class RewardModelScorer:
    """Returns the model's one logit for `prompt + response + eos`; concurrent calls share forward passes.

    With an ensemble the reward is the members' mean, and the part `uncertainty` their population standard deviation.
    Texts of similar length share a pass of at most `max_batch_tokens` including padding; a longer text runs alone.
    A text longer than the model's context is an error that names the item; it is never cut. Raises InputError if the
    folder has no model with one label, or weights that are not safetensors.
    """

    def __init__(
        self, folder: Path, *, name: str = REWARD_MODEL, max_batch_size: int = 256, max_batch_tokens: int = 16384
    ) -> None:
        folders = [folder, *member_folders(folder)]
        self.name = name
        self.version = f"{name}@{weights_digest(folder)}"
        self._tokenizer = load_tokenizer(folder)
        self._tokenizer.padding_side = "right"
        self._models = [self._load(each) for each in folders]
        contexts = [getattr(model.config, "max_position_embeddings", None) or math.inf for model in self._models]
        self._max_tokens = min(contexts)
        self._max_batch_tokens = max_batch_tokens
        self._batcher: Batcher[ScoreRequest, Outcome] = Batcher(self.score_batch, max_batch_size=max_batch_size)

    def _load(self, folder: Path) -> Any:
        try:
            model, info = AutoModelForSequenceClassification.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False, use_safetensors=True, output_loading_info=True
            )
        except (SafetensorError, OSError, ValueError) as error:
            raise InputError(REWARD_MODEL, f"cannot load {folder}: {error}") from error
        if missing := sorted(info["missing_keys"]):
            what = f"{folder} is not a trained reward model: its files lack {', '.join(missing[:3])}"
            raise InputError(REWARD_MODEL, what)
        self._check(model, folder)
        return model.eval().to("cuda" if torch.cuda.is_available() else "cpu")

    def _check(self, model: torch.nn.Module, folder: Path) -> None:
        if model.config.num_labels != 1:
            raise InputError(REWARD_MODEL, f"{folder} has {model.config.num_labels} labels; a reward model has one")
        if model.config.pad_token_id is None or self._tokenizer.pad_token_id is None:
            raise InputError(REWARD_MODEL, f"{folder} defines no padding token")
        if self._tokenizer.eos_token is None:
            raise InputError(REWARD_MODEL, f"the tokenizer of {folder} has no end-of-sequence token")

    async def score(self, requests: Sequence[ScoreRequest]) -> list[Outcome]:
        """Return one outcome per request, in order."""
        return await self._batcher.run(requests)

    def close(self) -> None:
        """Let the thread end after its current batch."""
        self._batcher.close()

    def score_batch(self, requests: Sequence[ScoreRequest]) -> list[Outcome]:
        """Return one outcome per request, in as few forward passes as their lengths allow. Blocks."""
        outcomes: dict[int, Outcome] = {}
        token_ids = self._token_ids(requests, outcomes)
        fitting = list(token_ids)
        for positions in batches_by_length([len(token_ids[i]) for i in fitting], max_tokens=self._max_batch_tokens):
            batch = [fitting[position] for position in positions]
            for i, rewards in zip(batch, self._forward([token_ids[i] for i in batch]), strict=True):
                outcomes[i] = self._outcome(requests[i], rewards)
        return [outcomes[i] for i in range(len(requests))]

    def _token_ids(self, requests: Sequence[ScoreRequest], outcomes: dict[int, Outcome]) -> dict[int, list[int]]:
        """Return the token ids of each valid request by its index; errors of the others go into `outcomes`."""
        texts: dict[int, tuple[str, str]] = {}
        for i, request in enumerate(requests):
            try:
                texts[i] = (self._prompt(request), request.response)
            except InputError as error:
                outcomes[i] = RewardError(self.name, f"{request.id}: {error}")
        found = {}
        prompts, responses = ([text[side] for text in texts.values()] for side in (0, 1))
        for i, ids in zip(texts, scored_token_ids(self._tokenizer, prompts, responses), strict=True):
            if len(ids) <= self._max_tokens:
                found[i] = ids
            else:
                what = f"{requests[i].id} has {len(ids)} tokens; the model reads at most {self._max_tokens}"
                outcomes[i] = RewardError(self.name, what)
        return found

    def _prompt(self, request: ScoreRequest) -> str:
        """Return the prompt, or the column `messages` rendered by the chat template if the prompt is empty."""
        if request.prompt or MESSAGES not in request.columns:
            return request.prompt
        require_template(self._tokenizer, MESSAGES)
        return render(self._tokenizer, request.columns[MESSAGES], MESSAGES, is_prompt=True)

    def _forward(self, token_ids: list[list[int]]) -> list[list[float]]:
        """Return, per text, the reward of every member; one padded pass per member."""
        batch = self._tokenizer.pad({"input_ids": token_ids}, return_tensors="pt").to(self._models[0].device)
        with torch.inference_mode():
            logits = [
                model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 0]
                for model in self._models
            ]
        rewards: list[list[float]] = torch.stack(logits, dim=1).float().cpu().tolist()
        return rewards

    def _outcome(self, request: ScoreRequest, rewards: Sequence[float]) -> Outcome:
        if not all(map(math.isfinite, rewards)):
            bad = next(reward for reward in rewards if not math.isfinite(reward))
            return RewardError(self.name, f"{self.version} gave {bad} for {request.id}, not a finite number")
        mean = math.fsum(rewards) / len(rewards)
        parts = {REWARD_MODEL: mean}
        if len(rewards) > 1:
            parts[UNCERTAINTY] = math.sqrt(math.fsum((reward - mean) ** 2 for reward in rewards) / len(rewards))
        return Score(request.id, mean, parts, self.version)


def batches_by_length(lengths: Sequence[int], *, max_tokens: int) -> Iterator[list[int]]:
    """Yield batches of text indices, shortest texts first.

    A batch, padded to its longest text, has at most `max_tokens`, or is a single text.
    """
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if batch and (len(batch) + 1) * lengths[index] > max_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
