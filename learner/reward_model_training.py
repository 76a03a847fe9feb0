"""Reward model training: preferences in, a sequence classifier with one label out as a Hugging Face folder.

What serves the folder reads a response as it is read here: tokenizer(prompt + response + end of sequence).
Knows nothing of who prefers, of Ray or of stages. B pairs, T tokens a row, padded on the right.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoModelForSequenceClassification

from cluster.errors import InputError
from learner.config import RewardModelConfig
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

CENTERING = 0.01
"""Weight of the squared mean reward of a batch: preferences leave the level of rewards open, this keeps it near 0."""

_COLUMNS = ("prompt", "chosen", "rejected")
_Pairs = list[tuple[list[int], list[int]]]


def train_reward_model(
    model_path: Path, preferences_path: Path, output_path: Path, config: RewardModelConfig, *, seed: int
) -> Iterator[dict[str, float]]:
    """Train a new head and the trunk of `model_path` on columns prompt, chosen, rejected; yield metrics each step.

    The last yield, made once the model has replaced `output_path`, is the accuracy on pairs held out of training and
    `num_pairs`, their number. Raises InputError naming the file and what is wrong with it.
    """
    torch.manual_seed(seed)
    tokenizer = load_tokenizer(model_path)
    pairs = _read_pairs(tokenizer, preferences_path)
    model = load_model(AutoModelForSequenceClassification, model_path, num_labels=1).train()
    model.config.pad_token_id = tokenizer.pad_token_id
    _check_pairs_fit(model, pairs, preferences_path)
    generator = torch.Generator().manual_seed(seed)
    training, held_out = split(pairs, config.held_out_share, generator, preferences_path)
    yield from _descend(model, training, config, generator)
    accuracy = _accuracy(model, held_out)
    save_model_folder(model, tokenizer, model_path, output_path)
    yield {"accuracy": accuracy, "num_pairs": float(len(held_out)), "num_training_pairs": float(len(training))}


def reward_model_accuracy(model_path: Path, preferences_path: Path) -> float:
    """Share of the pairs whose chosen response gets the higher reward, a tie counted as a half."""
    pairs = _read_pairs(load_tokenizer(model_path), preferences_path)
    model = load_model(AutoModelForSequenceClassification, model_path)
    _check_pairs_fit(model, pairs, preferences_path)
    return _accuracy(model, pairs)


def split(pairs: _Pairs, share: float, generator: torch.Generator, path: Path) -> tuple[_Pairs, _Pairs]:
    """Pairs to train on and pairs held out, at least one of each. Raises InputError on a single pair."""
    if len(pairs) < 2:
        raise InputError(str(path), "a single pair: one is needed for training and one to be held out")
    order = torch.randperm(len(pairs), generator=generator).tolist()
    num_held_out = min(max(1, round(share * len(pairs))), len(pairs) - 1)
    shuffled = [pairs[index] for index in order]
    return shuffled[num_held_out:], shuffled[:num_held_out]


def bradley_terry_loss(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    """Mean negative log-likelihood [] of the preferences, given the rewards [B] (Bradley and Terry 1952), centred."""
    return -F.logsigmoid(chosen - rejected).mean() + CENTERING * (chosen + rejected).mean().square()


def _descend(
    model: Any, training: _Pairs, config: RewardModelConfig, generator: torch.Generator
) -> Iterator[dict[str, float]]:
    num_steps = config.num_epochs * -(-len(training) // config.batch_size)
    optimizer = Optimizer(model, learning_rate=config.learning_rate, num_steps=num_steps)
    batches = shuffled_batches(len(training), config.batch_size, generator)
    for step in range(1, num_steps + 1):
        started = time.perf_counter()
        batch = [training[index] for index in next(batches)]
        chosen, rejected = _rewards(model, batch)
        loss = bradley_terry_loss(chosen, rejected)
        optimizer.step(loss)
        yield {
            "loss": loss.item(),
            "step": float(step),
            "accuracy": _agreement(chosen, rejected).mean().item(),
            "pairs_per_s": len(batch) / (time.perf_counter() - started),
        }


def _read_pairs(tokenizer: Any, path: Path) -> _Pairs:
    rows = read_text_columns(path, _COLUMNS)
    chosen, rejected = (
        tokenizer([p + r + tokenizer.eos_token for p, r in zip(rows["prompt"], rows[column], strict=True)]).input_ids
        for column in ("chosen", "rejected")
    )
    return list(zip(chosen, rejected, strict=True))


def _check_pairs_fit(model: Any, pairs: _Pairs, path: Path) -> None:
    check_fits(model, [max(pair, key=len) for pair in pairs], path)


def _rewards(model: Any, batch: Sequence[tuple[list[int], list[int]]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rewards [B] of the chosen and of the rejected responses, from one forward pass over all of them."""
    rows = [chosen for chosen, _ in batch] + [rejected for _, rejected in batch]
    ids = pad(rows, model.config.pad_token_id).to(model.device)
    mask = pad([[1] * len(row) for row in rows], 0).to(model.device)
    rewards = model(input_ids=ids, attention_mask=mask).logits[:, 0].float()
    return rewards[: len(batch)], rewards[len(batch) :]


def _accuracy(model: Any, pairs: _Pairs, batch_size: int = 256) -> float:
    model.eval()
    starts = range(0, len(pairs), batch_size)
    with torch.no_grad():
        agreements = [_agreement(*_rewards(model, pairs[start : start + batch_size])) for start in starts]
    return float(torch.cat(agreements).mean())


def _agreement(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    """[B]: 1 where the chosen response got the higher reward, 0 where the lower, 0.5 on a tie."""
    return ((chosen > rejected).float() + (chosen >= rejected).float()) / 2
