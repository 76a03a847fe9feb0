"""The kind `reward_model`: a trained reward model in a folder.

Imports torch only when a scorer is built.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from reward_service.config.scorers import TrainedModelConfig
from reward_service.scorers.files import require_reward_model
from reward_service.scorers.scorer import Builder, Kind, Scorer, register_kind, setting_key


def reward_model_scorer(name: str, builder: Builder) -> Scorer:
    """Load the reward model of scorer `name`."""
    from reward_service.scorers.reward_model import RewardModelScorer

    return RewardModelScorer(
        builder.reward_model_folder(name),
        name=name,
        max_batch_size=builder.max_batch_size,
        max_batch_tokens=builder.max_batch_tokens,
    )


def _build(name: str, config: TrainedModelConfig, builder: Builder) -> Scorer:
    return reward_model_scorer(name, builder)


def _check_files(name: str, config: TrainedModelConfig, folders: Mapping[str, Path]) -> None:
    require_reward_model(config.folder(), setting_key(name, "path"))


register_kind(TrainedModelConfig, Kind(_build, _check_files))
