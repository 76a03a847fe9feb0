"""Adapters are merged into every kind of linear layer, and refused on others by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import GPT2Config, GPT2LMHeadModel

from cluster.errors import InputError
from learner.config import LoraConfig
from learner.distributed.ranks import Ranks
from learner.model.actor_critic import ActorCritic, ModelSettings, load_causal_model
from learner.model.lora import add_adapters
from learner.ppo.batch import make_batch
from tests.learner.conftest import VOCABULARY, write_policy
from tests.support.ppo_ranks import CPU, make_rank, settings, share, trajectories

SHAPE = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "initializer_range": 0.2}


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2, whose layers are Conv1D: some of their weights are square, so that a missing transposition is silent."""
    folder = write_policy(tmp_path_factory.mktemp("gpt2") / "model")
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, **SHAPE)).save_pretrained(folder)
    return folder


def test_adapters_of_gpt2_are_merged_and_written_as_they_are_trained(gpt2: Path, tmp_path: Path) -> None:
    rank = make_rank(settings(gpt2, "lora", "ddp"), Ranks(CPU, distributed=False))
    rank.update(1, share(1, 0, 1))
    rank.save_policy(tmp_path / "policy")
    batch = make_batch(trajectories(1))
    inputs = (batch.token_ids, batch.mask, batch.lengths)
    plain, merged = (ActorCritic(ModelSettings(f, "float32", "none", 0.7)) for f in (gpt2, tmp_path / "policy"))
    with torch.no_grad():
        before, trained, after = (net(*inputs).logprobs for net in (plain, rank._model, merged))
    assert float((trained - before).abs().max()) > 1e-3
    torch.testing.assert_close(after, trained, atol=1e-5, rtol=0)
    token_ids = torch.arange(12)[None]
    base: Any = load_causal_model(gpt2, "float32")
    with torch.no_grad():
        whole = load_causal_model(tmp_path / "policy", "float32")(input_ids=token_ids).logits
        adapted = PeftModel.from_pretrained(base, str(tmp_path / "policy" / "adapter"))(input_ids=token_ids).logits
    torch.testing.assert_close(adapted, whole, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("target", "kind"), [("wte", "Embedding"), ("wpe", "Embedding")])
def test_a_layer_that_is_not_linear_is_refused_by_name(gpt2: Path, target: str, kind: str) -> None:
    model = load_causal_model(gpt2, "float32")
    with pytest.raises(InputError, match=rf"target_modules: .*{target} is a {kind}: adapters are for linear layers"):
        add_adapters(model, LoraConfig(rank=2, target_modules=("c_attn", target)), seed=0)


def test_a_missing_layer_is_refused(gpt2: Path) -> None:
    with pytest.raises(InputError, match=r"learner\.lora\.target_modules"):
        add_adapters(load_causal_model(gpt2, "float32"), LoraConfig(rank=2, target_modules=("q_proj",)), seed=0)
