"""The networks' outputs match those of transformers and do not depend on padding."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from cluster.errors import InputError
from learner.model.actor_critic import ActorCritic, ModelSettings, load_causal_model
from learner.ppo.batch import make_batch
from learner.ppo.weights import default_probe, probe_logprobs, published_tensors
from tests.learner.conftest import make_trajectory, make_two_turn_trajectory, write_policy

TEMPERATURE = 0.7


def settings(path: Path, critic: str = "shared") -> ModelSettings:
    return ModelSettings(path, "float32", critic, TEMPERATURE)  # type: ignore[arg-type]


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_logprobs_and_entropy_match_transformers_at_the_temperature(policy_path: Path, critic: str) -> None:
    trajectory = make_two_turn_trajectory(0)
    batch = make_batch([make_trajectory(1), trajectory])
    outputs = ActorCritic(settings(policy_path, critic))(batch.token_ids, batch.mask, batch.lengths)
    plain = AutoModelForCausalLM.from_pretrained(policy_path, dtype=torch.float32).eval()
    logits = plain(input_ids=torch.tensor([trajectory.token_ids])).logits[0] / TEMPERATURE
    distributions = torch.log_softmax(logits, -1)
    for t, sampled in enumerate(trajectory.mask):
        expected = distributions[t - 1, trajectory.token_ids[t]] if sampled else torch.tensor(0.0)
        torch.testing.assert_close(outputs.logprobs[1, t], expected, atol=1e-5, rtol=0)
        entropy = torch.distributions.Categorical(logits=logits[t - 1]).entropy() if sampled else torch.tensor(0.0)
        torch.testing.assert_close(outputs.entropy[1, t], entropy, atol=1e-5, rtol=0)


@pytest.mark.parametrize("critic", ["shared", "separate"])
@pytest.mark.parametrize("packing", [True, False])
def test_outputs_ignore_padding_and_values_see_only_earlier_tokens(
    policy_path: Path, critic: str, packing: bool
) -> None:
    model = ActorCritic(replace(settings(policy_path, critic), packing=packing))
    assert model.value_head is not None
    with torch.no_grad():
        model.value_head.weight.normal_(generator=torch.Generator().manual_seed(0))
    alone = make_batch([make_trajectory(0)])
    width = alone.token_ids.shape[1]
    padded = torch.nn.functional.pad(alone.token_ids, (0, 9), value=7)
    mask = torch.nn.functional.pad(alone.mask, (0, 9))
    with torch.no_grad():
        for short, long in zip(
            model(alone.token_ids, alone.mask, alone.lengths), model(padded, mask, alone.lengths), strict=True
        ):
            torch.testing.assert_close(long[:, :width], short, atol=1e-5, rtol=0)
            assert torch.equal(long[:, width:], torch.zeros(1, 9))
        changed = alone.token_ids.clone()
        changed[0, -1] = (changed[0, -1] + 1) % 48
        values, others = (model(ids, alone.mask, alone.lengths).values for ids in (alone.token_ids, changed))
    assert torch.equal(values, others)
    assert values[alone.mask].std() > 0


def test_values_start_at_zero(policy_path: Path) -> None:
    batch = make_batch([make_trajectory(0)])
    for critic in ("shared", "separate"):
        outputs = ActorCritic(settings(policy_path, critic))(batch.token_ids, batch.mask, batch.lengths)
        assert torch.equal(outputs.values, torch.zeros_like(outputs.values))


@pytest.mark.parametrize("tied", [True, False])
def test_published_tensors_include_the_head_even_if_tied(tmp_path: Path, tied: bool) -> None:
    path = write_policy(tmp_path / "policy", tie_word_embeddings=tied)
    model = load_causal_model(path, "float32")
    tensors = dict(published_tensors(model, torch.float32))
    assert tensors["lm_head.weight"].shape == tensors["model.embed_tokens.weight"].shape
    assert torch.equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"]) == tied


def test_probe_logprobs_match_the_whole_sequence_at_temperature_one(policy_path: Path) -> None:
    actor_critic = ActorCritic(settings(policy_path))
    model = AutoModelForCausalLM.from_pretrained(policy_path, dtype=torch.float32).eval()
    sequences = (*default_probe(model.config, seed=0), (3, 1, 4), (5,))
    for ids, logprobs in zip(sequences, probe_logprobs(actor_critic, sequences, torch.device("cpu")), strict=True):
        distributions = torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0], -1)
        expected = [float(distributions[t - 1, ids[t]].detach()) for t in range(1, len(ids))]
        assert logprobs == pytest.approx(expected, abs=1e-5)
    assert default_probe(model.config, seed=0) == default_probe(model.config, seed=0)


def test_a_folder_that_lacks_weights_of_the_model_is_refused(tmp_path: Path) -> None:
    path = write_policy(tmp_path / "policy", tie_word_embeddings=False)
    tensors = load_file(path / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"lack 1 weights of LlamaForCausalLM, such as lm_head\.weight"):
        load_causal_model(path, "float32")


def test_a_missing_model_and_capped_logits_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no model folder"):
        load_causal_model(tmp_path, "float32")
    from transformers import CohereConfig, CohereForCausalLM

    shape = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "logit_scale": 0.5}
    config = CohereConfig(vocab_size=48, hidden_size=32, intermediate_size=32, **shape)
    CohereForCausalLM(config).save_pretrained(tmp_path / "scaled")
    with pytest.raises(InputError, match="cohere scales or caps its logits"):
        load_causal_model(tmp_path / "scaled", "float32")
