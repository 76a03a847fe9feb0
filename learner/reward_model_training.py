"""Reward model training: preferences in, a sequence classifier with one label out as a Hugging Face folder.

What serves the folder reads a response as it is read here: prompt + response + end of sequence, tokenized together.
Knows nothing of who prefers, of Ray or of stages. B pairs, T tokens a row, padded on the right.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoModelForSequenceClassification

from learner.config import RewardModelConfig
from learner.datasets import Limit, Pair, read_pairs
from learner.supervised import load_model, load_tokenizer, pad, save_model_folder, shuffled_batches, split
from learner.supervised_loop import BatchLoss, Plan, checkpoints_of, descend

CENTERING = 0.01
"""Weight of the squared mean reward of a batch: preferences leave the level of rewards open, this keeps it near 0."""


def train_reward_model(
    model_path: Path,
    preferences_path: Path,
    output_path: Path,
    config: RewardModelConfig,
    checkpoints_path: Path | None = None,
    *,
    seed: int,
) -> Iterator[dict[str, float]]:
    """Train a new head and the trunk of `model_path` on preferences; yield metrics each optimiser step.

    First of all the pairs are counted (`num_examples`, `num_cut`, `num_dropped`). The last yield, made once the model
    has replaced `output_path`, is its accuracy and loss on pairs held out of training and `num_pairs`, their number.
    The same seed gives the same weights on a CPU, interrupted or not where `checkpoints_path` is given. Raises
    InputError naming the file and what is wrong with it.
    """
    torch.manual_seed(seed)
    tokenizer = load_tokenizer(model_path)
    pairs = read_pairs(tokenizer, preferences_path)
    model = load_model(AutoModelForSequenceClassification, model_path, num_labels=1).train()
    model.config.pad_token_id = tokenizer.pad_token_id
    pairs, counts = Limit.of(model, config, "reward_model").applied(pairs, preferences_path)
    checkpoints = checkpoints_of(checkpoints_path, config, seed, pairs)
    generator = torch.Generator().manual_seed(seed)
    training, held_out = split(pairs, config.held_out_share, generator, preferences_path)
    yield counts

    def loss_of(batch: list[int]) -> BatchLoss:
        rows = [training[index] for index in batch]
        chosen, rejected = _rewards(model, rows)
        loss = bradley_terry_loss(chosen, rejected, _margins(rows, chosen))
        return BatchLoss(loss, {"accuracy": _agreement(chosen, rejected).mean().item()}, len(rows))

    batches = shuffled_batches(len(training), config.batch_size, generator)
    evaluate = partial(_held_out, model, held_out)
    kept = yield from descend(model, batches, loss_of, evaluate, _plan(config, len(training)), checkpoints)
    save_model_folder(model, tokenizer, model_path, output_path)
    if checkpoints:
        checkpoints.remove()
    yield {
        "accuracy": kept["held_out_accuracy"],
        "held_out_loss": kept["held_out_loss"],
        "best_step": kept["step"],
        "num_pairs": float(len(held_out)),
        "num_training_pairs": float(len(training)),
    }


def _plan(config: RewardModelConfig, num_training: int) -> Plan:
    """Measured after every epoch."""
    steps_per_epoch = -(-num_training // config.batch_size)
    return Plan(
        num_steps=config.num_epochs * steps_per_epoch,
        learning_rate=config.learning_rate,
        evaluate_every_steps=steps_per_epoch,
        keeps_best=config.patience is not None,
        patience=config.patience,
        checkpoint_every_steps=config.checkpoint_every_steps,
        unit="pairs",
    )


def reward_model_accuracy(
    model_path: Path, preferences_path: Path, config: RewardModelConfig = RewardModelConfig()
) -> float:
    """Share of the pairs whose chosen response gets the higher reward, a tie counted as a half.

    Pairs that are too long are cut or left out as `config` says.
    """
    pairs = read_pairs(load_tokenizer(model_path), preferences_path)
    model = load_model(AutoModelForSequenceClassification, model_path).eval()
    pairs, _ = Limit.of(model, config, "reward_model").applied(pairs, preferences_path)
    with torch.no_grad():
        return _held_out(model, pairs)["held_out_accuracy"]


def bradley_terry_loss(
    chosen: torch.Tensor, rejected: torch.Tensor, margins: torch.Tensor | float = 0.0
) -> torch.Tensor:
    """Mean negative log-likelihood [] of the preferences, given the rewards [B] (Bradley and Terry 1952), centred.

    `margins` [B] is by how much the chosen reward should be higher (Llama 2, arXiv:2307.09288, eq. 2).
    """
    return _nll(chosen, rejected, margins).mean() + CENTERING * (chosen + rejected).mean().square()


def _nll(chosen: torch.Tensor, rejected: torch.Tensor, margins: torch.Tensor | float) -> torch.Tensor:
    """[B]: each preference's negative log-likelihood."""
    return -F.logsigmoid(chosen - rejected - margins)


def _margins(pairs: Sequence[Pair], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor([pair.margin for pair in pairs], dtype=like.dtype, device=like.device)


def _rewards(model: Any, batch: Sequence[Pair]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rewards [B] of the chosen and of the rejected responses, from one forward pass over all of them."""
    rows = [pair.chosen for pair in batch] + [pair.rejected for pair in batch]
    ids = pad(rows, model.config.pad_token_id).to(model.device)
    mask = pad([[1] * len(row) for row in rows], 0).to(model.device)
    rewards = model(input_ids=ids, attention_mask=mask).logits[:, 0].float()
    return rewards[: len(batch)], rewards[len(batch) :]


def _held_out(model: Any, pairs: Sequence[Pair], batch_size: int = 256) -> dict[str, float]:
    """Accuracy and loss, not centred, over all the pairs."""
    losses, agreements = [], []
    for start in range(0, len(pairs), batch_size):
        batch = pairs[start : start + batch_size]
        chosen, rejected = _rewards(model, batch)
        agreements.append(_agreement(chosen, rejected))
        losses.append(_nll(chosen, rejected, _margins(batch, chosen)))
    return {
        "held_out_accuracy": float(torch.cat(agreements).mean()),
        "held_out_loss": float(torch.cat(losses).mean()),
    }


def _agreement(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    """[B]: 1 where the chosen response got the higher reward, 0 where the lower, 0.5 on a tie."""
    return ((chosen > rejected).float() + (chosen >= rejected).float()) / 2
