"""The supervised stages as generator functions for a process of their own.

Whoever starts them is spared the import of torch: it happens where they run.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from learner.config import cpu_threads


def sft(*args: Any, seed: int, num_threads: int) -> Iterator[dict[str, float]]:
    """`learner.sft.train_sft`."""
    from learner.sft import train_sft

    _use_threads(num_threads)
    yield from train_sft(*args, seed=seed)


def reward_model(*args: Any, seed: int, num_threads: int) -> Iterator[dict[str, float]]:
    """`learner.reward_model_training.train_reward_model`."""
    from learner.reward_model_training import train_reward_model

    _use_threads(num_threads)
    yield from train_reward_model(*args, seed=seed)


def reward_model_accuracy(model: Path, pairs: Path, *, seed: int, num_threads: int) -> Iterator[dict[str, float]]:
    """`learner.reward_model_training.reward_model_accuracy`; it draws nothing, so the seed changes nothing."""
    from learner.reward_model_training import reward_model_accuracy

    _use_threads(num_threads)
    yield {"accuracy": reward_model_accuracy(model, pairs)}


def _use_threads(num_threads: int) -> None:
    """Ray starts a process with one thread for torch."""
    import torch

    torch.set_num_threads(cpu_threads(num_threads))
