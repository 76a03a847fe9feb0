"""The letters task has the sizes and the reward of its reference curve."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from deploy.config.load import load_run_config
from examples.letters.data import build_data
from examples.letters.model import build_model, build_tokenizer
from examples.letters.scorers import count_a, evaluate


def test_the_model_has_1278560_parameters_tied_heads_of_32_and_46_tokens(tmp_path: Path) -> None:
    build_model(tmp_path, seed=0)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert sum(parameter.numel() for parameter in model.parameters()) == 1_278_560
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert (model.config.head_dim, model.config.num_attention_heads, len(tokenizer)) == (32, 5, 46)


def test_every_character_is_a_token_and_decoding_drops_special_tokens() -> None:
    tokenizer = build_tokenizer()
    text = "bcdefghb:a a.,:=+09z"
    ids = tokenizer(text).input_ids
    assert len(ids) == len(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([*ids, tokenizer.pad_token_id, tokenizer.eos_token_id], skip_special_tokens=True) == text


def test_prompts_are_eight_letters_and_a_colon_all_different(tmp_path: Path) -> None:
    build_data(tmp_path, seed=0)
    training, held_out = (
        pq.read_table(tmp_path / f"{name}.parquet").column("prompt").to_pylist() for name in ("prompts", "evaluation")
    )
    assert all(len(prompt) == 9 and set(prompt[:-1]) <= set("bcdefgh") and prompt[-1] == ":" for prompt in training)
    assert len({*training, *held_out}) == len(training) + len(held_out)


def test_the_reward_is_the_number_of_a_over_sixteen() -> None:
    assert count_a(["b:"] * 3, ["a" * 16, "abab", ""], label=[1, 2, 3]) == [1.0, 0.125, 0.0]
    assert evaluate(["b:"] * 2, ["a" * 16, ""]) == {"share_of_a": 0.5}


def test_the_run_file_has_the_settings_of_the_reference_curve() -> None:
    config = load_run_config(Path("examples/letters/run.toml"))
    assert config.run.stages == ("ppo",)
    assert config.trajectory_queue.groups_per_step * config.rollout_actors.responses_per_prompt == 64
    learner = config.learner
    assert (learner.num_minibatches, learner.num_epochs, learner.critic) == (1, 4, "separate")
    assert (learner.learning_rate, learner.kl_coefficient, learner.value_coefficient) == (5e-4, 0.01, 0.5)
    assert (learner.clip, learner.value_clip, learner.gamma, learner.gae_lambda) == (0.2, 0.2, 1.0, 0.95)
    assert learner.num_steps * 64 == pytest.approx(2560)
