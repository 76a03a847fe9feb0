"""Builds an actor's engine and reads the weights that it loads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.errors import InputError
from cluster.weights.manifest import Manifest
from cluster.weights.transport import carrier
from rollout_actors.config import RolloutActorsConfig
from rollout_actors.engine.protocol import GenerationEngine

if TYPE_CHECKING:
    import torch

FETCH_TIMEOUT_S = 300.0
MIN_MODEL_LEN = 128


def build_vllm(
    config: RolloutActorsConfig, *, model_path: str, dtype: str, seed: int, max_tokens: int
) -> GenerationEngine:
    """Build and warm up vLLM for the actor's concurrent responses, with up to `max_tokens` each."""
    from rollout_actors.engine.vllm_engine import VllmEngine

    sizes = {"max_num_seqs": config.num_concurrent_groups * config.responses_per_prompt}
    return VllmEngine(
        model_path,
        engine_args=sizes | config.engine,
        max_model_len=_max_model_len(max_tokens, Path(model_path)),
        seed=seed,
        dtype=dtype,
    )


def _max_model_len(max_tokens: int, folder: Path) -> int:
    """Return a length that fits the longest sequence and the probe prompts, within the context."""
    context = json.loads((folder / "config.json").read_text()).get("max_position_embeddings")
    wanted = max(max_tokens + 1, MIN_MODEL_LEN)
    return wanted if context is None else min(wanted, int(context))


def fetch_published(manifest: Manifest) -> Mapping[str, torch.Tensor]:
    """Fetch the tensors of a published version with the carrier that it names, checksums verified. Blocks."""
    return carrier(manifest.carrier).fetch(manifest, timeout_s=FETCH_TIMEOUT_S)


def read_policy(folder: Path) -> Mapping[str, torch.Tensor]:
    """Return the tensors of a Hugging Face folder. Raises InputError if it contains no safetensors."""
    from safetensors.torch import load_file

    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise InputError(str(folder), "holds no safetensors")
    return {name: tensor for file in files for name, tensor in load_file(file).items()}
