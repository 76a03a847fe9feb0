"""The supervised stages as generator functions for a process of their own.

Whoever starts them is spared the import of torch: it happens where they run.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from learner.config import num_cores


def sft(*args: Any, seed: int) -> Iterator[dict[str, float]]:
    """`learner.sft.train_sft`."""
    from learner.sft import train_sft

    _use_all_cores()
    yield from train_sft(*args, seed=seed)


def reward_model(*args: Any, seed: int) -> Iterator[dict[str, float]]:
    """`learner.reward_model_training.train_reward_model`."""
    from learner.reward_model_training import train_reward_model

    _use_all_cores()
    yield from train_reward_model(*args, seed=seed)


def reward_model_accuracy(*args: Any, seed: int) -> Iterator[dict[str, float]]:
    """`learner.reward_model_training.reward_model_accuracy`; it draws nothing, so the seed changes nothing."""
    from learner.reward_model_training import reward_model_accuracy

    _use_all_cores()
    yield {"accuracy": reward_model_accuracy(*args)}


def _use_all_cores() -> None:
    """Nothing else runs beside a supervised stage, but Ray starts its process with one thread for torch."""
    import torch

    torch.set_num_threads(num_cores())
