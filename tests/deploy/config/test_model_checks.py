"""Test which architectures a policy may have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from cluster.errors import InputError
from cluster.model_limits import context_length
from deploy.config.model_checks import check_adapters, check_architecture, check_rope
from learner.config import LoraConfig

LLAMA = {"architectures": ["LlamaForCausalLM"], "vocab_size": 4, "max_position_embeddings": 64}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_file({"model.embed_tokens.weight": np.zeros((4, 2), np.float32)}, tmp_path / "model.safetensors")
    return tmp_path


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"sliding_window": 32},
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 32}},
        {"num_experts": None, "logit_scale": 1.0, "final_logit_softcapping": None},
        {"architectures": None},
    ],
)
def test_dense_causal_models_are_accepted(folder: Path, settings: dict[str, Any]) -> None:
    check_architecture(LLAMA | settings, folder)
    check_rope(LLAMA | settings, folder, 64)


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"num_local_experts": 8}, "mixture of experts"),
        ({"num_experts": 128}, "mixture of experts"),
        ({"n_routed_experts": 64}, "mixture of experts"),
        ({"text_config": {"num_local_experts": 16}}, "mixture of experts"),
        ({"final_logit_softcapping": 30.0}, "scales or caps its logits"),
        ({"logits_scaling": 8.0}, "scales or caps its logits"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"quantised \(gptq\)"),
        ({"is_encoder_decoder": True}, "encoder-decoder"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "generates no text"),
        ({"architectures": ["BertModel"]}, "generates no text"),
        ({"vocab_size": 8}, "vocab_size is 8, but model.embed_tokens.weight has 4 rows"),
    ],
)
def test_other_models_are_refused_by_name(folder: Path, settings: dict[str, Any], what: str) -> None:
    with pytest.raises(InputError, match=what):
        check_architecture(LLAMA | settings, folder)


def test_rope_scaling_that_depends_on_the_length_is_refused_beyond_it(folder: Path) -> None:
    longrope = {"rope_scaling": {"type": "longrope"}, "original_max_position_embeddings": 16}
    check_rope(LLAMA | longrope, folder, 16)
    with pytest.raises(InputError, match="17 tokens, beyond the 16"):
        check_rope(LLAMA | longrope, folder, 17)
    with pytest.raises(InputError, match="65 tokens, beyond the 64"):
        check_rope(LLAMA | {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, folder, 65)


def test_the_context_of_a_stretched_rope_is_the_original_times_the_factor() -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    assert context_length(LLAMA | {"rope_scaling": yarn}) == 256
    assert context_length(LLAMA | {"rope_parameters": yarn | {"factor": 1.0}}) == 64
    assert context_length({"n_positions": 32}) == 32
    assert context_length({"text_config": LLAMA}) == 64
    assert context_length({"max_seq_len": 32}) == 32
    assert context_length({}) is None


@pytest.mark.parametrize(
    ("target", "what"),
    [
        ("q_prj", r"has no layer 'q_prj'; it has c_attn, q_proj"),
        ("mlp", r"has no layer 'mlp'; it has c_attn, q_proj"),
        ("norm", r"layers\.0\.norm is no linear layer, and only those can have adapters: choose among c_attn, q_proj"),
        ("embed_tokens", r"model\.embed_tokens is no linear layer"),
        ("conv", r"layers\.0\.conv is no linear layer"),
        ("wpe", r"model\.wpe is no linear layer"),
    ],
)
def test_adapters_are_refused_on_anything_but_linear_layers(tmp_path: Path, target: str, what: str) -> None:
    shapes = {"layers.0.q_proj": (2, 3), "layers.1.c_attn": (3, 6), "layers.0.norm": (3,), "layers.0.conv": (3, 1, 4)}
    shapes |= {"model.embed_tokens": (9, 3), "model.wpe": (8, 3)}
    save_file({f"{n}.weight": np.zeros(s, np.float32) for n, s in shapes.items()}, tmp_path / "model.safetensors")
    settings = LLAMA | {"vocab_size": 9}
    check_adapters(LoraConfig(rank=2, target_modules=("q_proj", "layers.1.c_attn")), settings, tmp_path)
    check_adapters(LoraConfig(target_modules=(target,)), settings, tmp_path)
    with pytest.raises(InputError, match=f"learner.lora.target_modules: .*{what}"):
        check_adapters(LoraConfig(rank=2, target_modules=(target,)), settings, tmp_path)
