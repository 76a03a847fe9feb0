"""Supervised fine-tuning: prompt-completion pairs in, the starting policy out as a Hugging Face folder.

Knows nothing of rewards, Ray or stages. B rows, T tokens a row, padded on the right.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from learner.config import SftConfig
from learner.supervised import (
    Optimizer,
    check_fits,
    load_model,
    load_tokenizer,
    pad,
    read_text_columns,
    save_model_folder,
    shuffled_batches,
)

_NO_LOSS = -100


def train_sft(
    model_path: Path, data_path: Path, output_path: Path, config: SftConfig, *, seed: int
) -> Iterator[dict[str, float]]:
    """Train on `data_path` (Parquet or JSON Lines, columns prompt and completion); yield metrics each optimiser step.

    After the last step the trained model replaces `output_path`, whole or not at all. The same seed gives the same
    weights on a CPU. Raises InputError naming the file and what is wrong with it.
    """
    torch.manual_seed(seed)
    rows = read_text_columns(data_path, ("prompt", "completion"))
    tokenizer = load_tokenizer(model_path)
    model = load_model(AutoModelForCausalLM, model_path).train()
    examples = tokenize(tokenizer, rows["prompt"], rows["completion"])
    check_fits(model, [ids for ids, _ in examples], data_path)
    optimizer = Optimizer(model, learning_rate=config.learning_rate, num_steps=config.num_steps)
    batches = shuffled_batches(len(examples), config.batch_size, torch.Generator().manual_seed(seed))
    for step in range(1, config.num_steps + 1):
        started = time.perf_counter()
        batch = [examples[index] for index in next(batches)]
        loss = completion_loss(model, batch, tokenizer.pad_token_id)
        optimizer.step(loss)
        num_tokens = sum(len(ids) for ids, _ in batch)
        tokens_per_s = num_tokens / (time.perf_counter() - started)
        yield {"loss": loss.item(), "step": float(step), "tokens_per_s": tokens_per_s}
    save_model_folder(model, tokenizer, model_path, output_path)


def tokenize(tokenizer: Any, prompts: Sequence[str], completions: Sequence[str]) -> list[tuple[list[int], int]]:
    """Each row's token ids, prompt then completion then end of sequence, with the length of its prompt."""
    prompt_ids = tokenizer(list(prompts)).input_ids
    completion_ids = tokenizer(list(completions), add_special_tokens=False).input_ids
    return [
        ([*prompt, *completion, tokenizer.eos_token_id], len(prompt))
        for prompt, completion in zip(prompt_ids, completion_ids, strict=True)
    ]


def completion_loss(model: Any, batch: Sequence[tuple[list[int], int]], pad_token_id: int) -> torch.Tensor:
    """Mean negative log-likelihood over the batch's completion tokens: every token weighs the same."""
    ids = pad([row for row, _ in batch], pad_token_id)
    labels = pad([[_NO_LOSS] * start + row[start:] for row, start in batch], _NO_LOSS)
    mask = pad([[1] * len(row) for row, _ in batch], 0)
    logits = model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device)).logits
    return F.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten().to(model.device), ignore_index=_NO_LOSS
    )
