"""Scorers and reward models as the tests build them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from ray import serve
from safetensors.torch import load_file, save_file

from reward_service.config.service import RewardServiceConfig, app_name
from reward_service.scorers.registry import build_scorers
from reward_service.scorers.scorer import Scorer


def build_scorer(config: RewardServiceConfig, reward_model_path: Path | None) -> Scorer:
    """What a run uses, of all its scorers."""
    return build_scorers(config, reward_model_path)[config.scorer]


def moved_model(folder: Path, to: Path, *, by: float = 1.0) -> Path:
    """The same model with other weights in its head."""
    shutil.copytree(folder, to)
    tensors = load_file(to / "model.safetensors")
    tensors["score.weight"] = tensors["score.weight"] + by
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    return to


def replica_pids(name: str) -> list[int]:
    """The processes of the replicas of run `name`'s service that are ready."""
    handle: Any = serve.get_app_handle(app_name(name))
    return sorted(handle.broadcast("pid").results(timeout_s=30.0))
