"""Supervised fine-tuning: prompt-completion pairs in, the starting policy out as a Hugging Face folder.

Knows nothing of rewards, Ray or stages. B rows, T tokens a row, padded on the right.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from learner.config import SftConfig
from learner.datasets import Completion, Limit, read_completions
from learner.supervised import load_model, load_tokenizer, pad, save_model_folder, shuffled_batches, split
from learner.supervised_loop import BatchLoss, Plan, checkpoints_of, descend

_NO_LOSS = -100


def train_sft(
    model_path: Path,
    data_path: Path,
    output_path: Path,
    config: SftConfig,
    checkpoints_path: Path | None = None,
    *,
    seed: int,
) -> Iterator[dict[str, float]]:
    """Train on the prompts and completions of `data_path`; yield metrics each optimiser step.

    First of all the examples are counted (`num_examples`, `num_cut`, `num_dropped`), and the last yield, made once the
    trained model has replaced `output_path`, whole or not at all, says what was measured of it on held-out examples.
    The same seed gives the same weights on a CPU, interrupted or not where `checkpoints_path` is given. Raises
    InputError naming the file and what is wrong with it.
    """
    torch.manual_seed(seed)
    tokenizer = load_tokenizer(model_path)
    examples = read_completions(tokenizer, data_path)
    model = load_model(AutoModelForCausalLM, model_path).train()
    examples, counts = Limit.of(model, config, "sft").applied(examples, data_path)
    checkpoints = checkpoints_of(checkpoints_path, config, seed, examples)
    generator = torch.Generator().manual_seed(seed)
    training, held_out = examples, list[Completion]()
    if config.held_out_share:
        training, held_out = split(examples, config.held_out_share, generator, data_path)
    yield counts | {"num_held_out": len(held_out)}
    pad_token_id = tokenizer.pad_token_id

    def loss_of(batch: list[int]) -> BatchLoss:
        rows = [training[index] for index in batch]
        return BatchLoss(completion_loss(model, rows, pad_token_id), {}, sum(len(ids) for ids, _ in rows))

    batches = shuffled_batches(len(training), config.batch_size, generator)
    evaluate = partial(_held_out, model, held_out, config.batch_size, pad_token_id) if held_out else None
    kept = yield from descend(model, batches, loss_of, evaluate, _plan(config), checkpoints)
    save_model_folder(model, tokenizer, model_path, output_path)
    if checkpoints:
        checkpoints.remove()
    if kept:
        yield {"held_out_loss": kept["held_out_loss"], "best_step": kept["step"]}


def _plan(config: SftConfig) -> Plan:
    return Plan(
        num_steps=config.num_steps,
        learning_rate=config.learning_rate,
        evaluate_every_steps=config.evaluate_every_steps,
        keeps_best=True,
        patience=config.patience,
        checkpoint_every_steps=config.checkpoint_every_steps,
        unit="tokens",
    )


def completion_loss(model: Any, batch: Sequence[tuple[list[int], int]], pad_token_id: int) -> torch.Tensor:
    """Mean negative log-likelihood over the batch's completion tokens: every token weighs the same."""
    ids = pad([row for row, _ in batch], pad_token_id)
    labels = pad([[_NO_LOSS] * start + row[start:] for row, start in batch], _NO_LOSS)
    mask = pad([[1] * len(row) for row, _ in batch], 0)
    logits = model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device)).logits
    return F.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten().to(model.device), ignore_index=_NO_LOSS
    )


def _held_out(
    model: Any, examples: Sequence[tuple[list[int], int]], batch_size: int, pad_token_id: int
) -> dict[str, float]:
    """The loss over all completion tokens of the examples."""
    total, num_tokens = 0.0, 0
    for start in range(0, len(examples), batch_size):
        batch = examples[start : start + batch_size]
        num = sum(len(ids) - max(1, num_prompt) for ids, num_prompt in batch)
        total += num * completion_loss(model, batch, pad_token_id).item()
        num_tokens += num
    return {"held_out_loss": total / num_tokens}
