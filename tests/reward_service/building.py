"""Scorers as the tests build them."""

from __future__ import annotations

from pathlib import Path

from reward_service.config import RewardServiceConfig
from reward_service.registry import build_scorers
from reward_service.scorer import Scorer


def build_scorer(config: RewardServiceConfig, reward_model_path: Path | None) -> Scorer:
    """What a run uses, of all its scorers."""
    return build_scorers(config, reward_model_path)[config.scorer]
