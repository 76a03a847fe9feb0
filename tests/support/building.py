"""Helpers that build scorers and reward models for tests."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ray import serve
from safetensors.torch import load_file, save_file

from cluster.scoring import Score, ScoreRequest
from reward_service.client.outcomes import RewardTransport, all_scores
from reward_service.config.service import RewardServiceConfig, app_name
from reward_service.scorers.registry import build_scorers
from reward_service.scorers.scorer import Scorer


def build_scorer(config: RewardServiceConfig, reward_model_path: Path | None) -> Scorer:
    """Return the run's scorer."""
    return build_scorers(config, reward_model_path)[config.scorer]


async def scores_of(client: RewardTransport, requests: Sequence[ScoreRequest]) -> list[Score]:
    """Return one score per request. Raises the first error among the outcomes."""
    return all_scores(await client.outcomes(requests))


def moved_model(folder: Path, to: Path, *, by: float = 1.0) -> Path:
    """Copy a reward model to `to` and add `by` to the weights of its head."""
    shutil.copytree(folder, to)
    tensors = load_file(to / "model.safetensors")
    tensors["score.weight"] = tensors["score.weight"] + by
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    return to


def replica_pids(name: str) -> list[int]:
    """Return the process ids of the ready replicas of run `name`'s service."""
    handle: Any = serve.get_app_handle(app_name(name))
    return sorted(handle.broadcast("pid").results(timeout_s=30.0))
