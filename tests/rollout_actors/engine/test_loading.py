"""Test that engine and learner read the same weights of a model folder, whatever lies beside them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import MistralConfig, MistralForCausalLM

from learner.model.actor_critic import load_causal_model
from rollout_actors.config import RolloutActorsConfig
from rollout_actors.engine.loading import build_vllm, read_policy, without_other_weights
from tests.support import tiny


@pytest.fixture
def mistral(tied_folder: Path, tmp_path: Path) -> Path:
    """A sharded Mistral as on its Hub page: other numbers in a consolidated file, and its own settings."""
    torch.manual_seed(3)
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = MistralConfig(
        vocab_size=tiny.VOCAB_SIZE, intermediate_size=128, head_dim=32, max_position_embeddings=128, **shape
    )
    MistralForCausalLM(config).save_pretrained(tmp_path, max_shard_size="60KB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((tied_folder / name).read_bytes())
    save_file({"tok_embeddings.weight": torch.zeros(tiny.VOCAB_SIZE, 64)}, tmp_path / "consolidated.safetensors")
    (tmp_path / "params.json").write_text('{"dim": 8, "n_layers": 1, "vocab_size": 7}')
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    return tmp_path


@pytest.mark.process
def test_the_engine_reads_the_shards_beside_a_consolidated_file(mistral: Path) -> None:
    config = RolloutActorsConfig(num_concurrent_groups=1, responses_per_prompt=2)
    engine = build_vllm(config, model_path=str(mistral), dtype="float32", seed=0, max_tokens=63)
    sequence = [4, 9, 30, 17, 5]
    found = engine.logprobs([sequence])[0]
    engine.close()
    assert np.allclose(found, tiny.logprobs(load_causal_model(mistral, "float32"), sequence), rtol=0, atol=1e-5)


def test_a_policy_is_read_without_the_weights_beside_it(mistral: Path) -> None:
    assert read_policy(mistral).keys() == load_causal_model(mistral, "float32").state_dict().keys()


def test_the_engine_gets_a_folder_without_other_weights(tied_folder: Path, tmp_path: Path) -> None:
    for path in tied_folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    with without_other_weights(tmp_path) as folder:
        assert folder == tmp_path
    save_file({"tok_embeddings.weight": torch.zeros(2)}, tmp_path / "consolidated.safetensors")
    with without_other_weights(tmp_path) as folder:
        assert {path.name for path in folder.iterdir()} == {path.name for path in tied_folder.iterdir()}
        assert load_file(folder / "model.safetensors").keys() == load_file(tied_folder / "model.safetensors").keys()
    assert not folder.exists()
