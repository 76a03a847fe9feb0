"""Builds an actor's engine and reads the weights that it loads."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.model_folder import INDEX, other_weight_files, weight_files
from cluster.model_limits import context_length
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
    with without_other_weights(Path(model_path)) as folder:
        return VllmEngine(
            str(folder),
            engine_args=sizes | config.engine,
            max_model_len=_max_model_len(max_tokens, folder),
            seed=seed,
            dtype=dtype,
        )


@contextlib.contextmanager
def without_other_weights(folder: Path) -> Iterator[Path]:
    """Yield a folder in which vLLM finds the model's own weights only: `folder`, or a temporary one of links to it.

    Without an index, vLLM reads every safetensors file of a folder.
    """
    others = other_weight_files(folder)
    if not others or (folder / INDEX).is_file():
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="antiphon-model-") as name:
        for path in folder.iterdir():
            if path not in others:
                (Path(name) / path.name).symlink_to(path.absolute())
        yield Path(name)


def _max_model_len(max_tokens: int, folder: Path) -> int:
    """Return a length that fits the longest sequence and the probe prompts, within the context.

    Has room for one token more, which vLLM needs to score a whole sequence.
    """
    context = context_length(json.loads((folder / "config.json").read_text()))
    wanted = max(max_tokens, MIN_MODEL_LEN)
    return (wanted if context is None else min(wanted, context)) + 1


def fetch_published(manifest: Manifest) -> Mapping[str, torch.Tensor]:
    """Fetch the tensors of a published version with the carrier that it names, checksums verified. Blocks."""
    return carrier(manifest.carrier).fetch(manifest, timeout_s=FETCH_TIMEOUT_S)


def read_policy(folder: Path) -> Mapping[str, torch.Tensor]:
    """Return the tensors of a Hugging Face folder. Raises InputError if it contains no weights, or not all of them."""
    from safetensors.torch import load_file

    return {name: tensor for file in weight_files(folder) for name, tensor in load_file(file).items()}
