"""A step gives the same weights packed or padded, in micro-batches, recomputed or sharded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from cluster.errors import InputError
from cluster.trajectory import Trajectory
from learner import checkpoint
from learner.config import LearnerConfig
from learner.distributed.ranks import Ranks
from learner.model.actor_critic import ActorCritic, ModelSettings, load_causal_model
from learner.model.packing import make_pack, packed_attention
from learner.ppo.batch import make_batch
from tests.learner.conftest import make_trajectory, make_two_turn_trajectory, run_two_ranks, write_policy
from tests.learner.ppo.test_rllib import OneRank, largest_difference
from tests.support.ppo_ranks import NETWORKS, settings, train

pytestmark = [pytest.mark.process, pytest.mark.slow]

BASE = LearnerConfig(num_epochs=2, num_minibatches=2, learning_rate=1e-2, entropy_coefficient=0.01, kl_target=0.5)
LAYOUTS: dict[str, dict[str, Any]] = {
    "padded": {"packing": False},
    "packed pieces": {"micro_batch_tokens": 40},
    "padded pieces": {"packing": False, "micro_batch_tokens": 40},
    "one sequence at a time": {"micro_batch_tokens": 1},
    "chunks of the vocabulary's distributions": {"logprob_chunk_tokens": 5},
    "activations computed again": {"activation_checkpointing": True},
}


def batch(step: int = 1) -> list[Trajectory]:
    """Make trajectories of many lengths, one of two turns."""
    return [*(make_trajectory(i, seed=step) for i in range(11)), make_two_turn_trajectory(11, version=-1, seed=step)]


def weights_after(path: Path, changes: dict[str, Any], dtype: str, trajectories: list[Trajectory]) -> dict[str, Tensor]:
    changes = dict(changes)
    max_tokens = changes.pop("micro_batch_tokens", 16_384)
    learner = OneRank(path, BASE.model_copy(update=changes), dtype=dtype, sgd=True, max_tokens=max_tokens)
    for step in (1, 2):
        learner.step(step, trajectories)
    return learner.weights()


@pytest.mark.parametrize(("dtype", "limit"), [("float32", 1e-5), ("float64", 1e-12)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layout_changes_only_rounding(policy_path: Path, layout: str, dtype: str, limit: float) -> None:
    plain = weights_after(policy_path, {}, dtype, batch())
    other = weights_after(policy_path, LAYOUTS[layout], dtype, batch())
    before = OneRank(policy_path, BASE, dtype=dtype).weights()
    assert largest_difference(plain, other) < limit
    assert largest_difference(plain, before) > 1e-3


@pytest.mark.parametrize("packing", [True, False])
def test_the_order_in_the_batch_changes_only_rounding(policy_path: Path, packing: bool) -> None:
    changes = {"packing": packing, "num_minibatches": 1}
    plain, turned = (weights_after(policy_path, changes, "float64", order) for order in (batch(), batch()[::-1]))
    assert largest_difference(plain, turned) < 1e-12


@pytest.mark.parametrize(("layout", "changes"), list(LAYOUTS.items())[:2])
@pytest.mark.parametrize("aggregation", ["sequence_mean_token_sum", "sequence_mean_token_mean"])
def test_the_layout_changes_only_rounding_with_every_aggregation(
    policy_path: Path, aggregation: str, layout: str, changes: Any
) -> None:
    plain = weights_after(policy_path, {"loss_aggregation": aggregation}, "float64", batch())
    other = weights_after(policy_path, {"loss_aggregation": aggregation, **changes}, "float64", batch())
    assert largest_difference(plain, other) < 1e-12, layout


@pytest.mark.parametrize("lengths", [[5], [7, 7, 7], [1, 30, 2, 64, 5, 31, 1]])
@pytest.mark.parametrize("num_key_heads", [4, 2])
def test_packed_attention_matches_plain_attention_of_each_sequence(lengths: list[int], num_key_heads: int) -> None:
    generator = torch.Generator().manual_seed(0)
    shape = [(1, heads, sum(lengths), 8) for heads in (4, num_key_heads, num_key_heads)]
    tensors = [torch.randn(s, dtype=torch.float64, generator=generator).requires_grad_() for s in shape]
    query, key, value = tensors
    pack = make_pack(lengths, torch.device("cpu"))
    found, _ = packed_attention(torch.nn.Module(), query, key, value, None, pack=pack)
    start, parts = 0, []
    for length in lengths:
        query, key, value = (tensor[:, :, start : start + length] for tensor in tensors)
        key, value = (tensor.repeat_interleave(4 // num_key_heads, 1) for tensor in (key, value))
        weights = (query @ key.transpose(-1, -2) / 8**0.5).masked_fill(
            torch.ones(length, length).triu(1).bool(), float("-inf")
        )
        parts.append((weights.softmax(-1) @ value).transpose(1, 2))
        start += length
    expected = torch.cat(parts, 1)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    direction = torch.randn(expected.shape, dtype=torch.float64, generator=generator)
    gradients = torch.autograd.grad((found * direction).sum(), tensors)
    for gradient, other in zip(gradients, torch.autograd.grad((expected * direction).sum(), tensors), strict=True):
        torch.testing.assert_close(gradient, other, atol=1e-12, rtol=0)


def test_packing_is_refused_if_a_window_would_slide_over_a_sequence() -> None:
    query = torch.zeros(1, 1, 6, 8)
    pack = make_pack([2, 4], torch.device("cpu"))
    packed_attention(torch.nn.Module(), query, query, query, None, pack=pack, sliding_window=4)
    with pytest.raises(InputError, match="slides a window of 3 tokens over 4"):
        packed_attention(torch.nn.Module(), query, query, query, None, pack=pack, sliding_window=3)


def test_chunks_limit_the_distributions_in_memory(policy_path: Path) -> None:
    sizes: list[int] = []
    model = ActorCritic(ModelSettings(policy_path, "float32", "none", 0.7, logprob_chunk_tokens=4))
    model.policy.get_output_embeddings().register_forward_hook(lambda _, __, out: sizes.append(len(out)))
    padded = make_batch(batch())
    model(padded.token_ids, padded.mask, padded.lengths).logprobs.sum().backward()
    num = int(padded.mask.sum())
    assert max(sizes) == 4
    assert sum(sizes) == 2 * num


def test_checkpointed_layers_are_computed_again(policy_path: Path) -> None:
    calls = []
    model = ActorCritic(ModelSettings(policy_path, "float32", "none", 0.7, activation_checkpointing=True))
    model.policy.model.layers[0].input_layernorm.register_forward_hook(lambda *_: calls.append(1))
    padded = make_batch(batch())
    model(padded.token_ids, padded.mask, padded.lengths).logprobs.sum().backward()
    assert len(calls) == 2


def test_half_precision_keeps_and_trains_weights_in_float32(policy_path: Path) -> None:
    exact, half = (OneRank(policy_path, BASE, dtype=dtype) for dtype in ("float32", "bfloat16"))
    seen = set()
    half.model.policy.model.layers[0].mlp.register_forward_hook(lambda _, __, out: seen.add(out.dtype))
    metrics = [learner.step(1, batch()) for learner in (exact, half)]
    assert seen == {torch.bfloat16}
    assert {tensor.dtype for tensor in half.weights().values()} == {torch.float32}
    assert 0 < largest_difference(exact.weights(), half.weights()) < 0.1
    assert metrics[0]["learner/kl_nats"] == pytest.approx(metrics[1]["learner/kl_nats"], rel=0.05)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoints of two ranks of every network, with ddp and with fsdp2."""
    folder = tmp_path_factory.mktemp("ranks")
    write_policy(folder / "policy")
    run_two_ranks("tests.support.ppo_ranks", folder)
    return folder


def state(path: Path) -> dict[str, Tensor]:
    stored = checkpoint.State(path)
    return {name: stored.read(name) for name in stored.names}


@pytest.mark.parametrize("data_parallel", ["ddp", "fsdp2"])
@pytest.mark.parametrize("network", NETWORKS)
def test_two_ranks_match_one_up_to_rounding(two_ranks: Path, tmp_path: Path, network: str, data_parallel: str) -> None:
    alone = Ranks(torch.device("cpu"), distributed=False)
    train(settings(two_ranks / "policy", network, "ddp"), alone, tmp_path)
    limit = {"float64": 1e-12, "float32": 1e-5, "bfloat16": 0.05}[NETWORKS[network][0]]
    both, one = (state(folder / "step-3") for folder in (two_ranks / f"{network} {data_parallel}" / "whole", tmp_path))
    assert both.keys() == one.keys()
    carried = ("reward_moments", "kl_", "constraint_")
    kinds = ("policy.",) if network == "half" else ("policy.", "critic.", "value_head.", *carried)
    trained = {name: tensor for name, tensor in one.items() if name.startswith(kinds)}
    assert largest_difference(trained, both) < limit


@pytest.mark.parametrize("data_parallel", ["ddp", "fsdp2"])
@pytest.mark.parametrize("network", NETWORKS)
def test_two_ranks_resume_bit_for_bit(two_ranks: Path, network: str, data_parallel: str) -> None:
    place = two_ranks / f"{network} {data_parallel}"
    whole, resumed = (sorted((place / name / "step-3").glob("state-*")) for name in ("whole", "resumed"))
    assert [file.name for file in whole] == [file.name for file in resumed]
    assert [file.read_bytes() for file in whole] == [file.read_bytes() for file in resumed]
    assert len(whole) == (2 if data_parallel == "fsdp2" else 1)


@pytest.mark.parametrize("network", ["separate", "lora"])
def test_one_rank_resumes_from_the_shards_of_two(two_ranks: Path, tmp_path: Path, network: str) -> None:
    alone = Ranks(torch.device("cpu"), distributed=False)
    kept = two_ranks / f"{network} fsdp2" / "whole" / "step-2"
    train(settings(two_ranks / "policy", network, "ddp", kept), alone, tmp_path)
    found, expected = (state(folder / "step-3") for folder in (tmp_path, kept.parent))
    assert largest_difference(expected, found) < 1e-5


@pytest.mark.parametrize("network", NETWORKS)
def test_a_checkpoints_policy_is_a_plain_model_of_the_same_weights(two_ranks: Path, network: str) -> None:
    dtype = NETWORKS[network][0]
    models = [
        load_causal_model(two_ranks / f"{network} {data_parallel}" / "whole" / "step-3" / "policy", dtype)
        for data_parallel in ("ddp", "fsdp2")
    ]
    assert {parameter.dtype for parameter in models[0].parameters()} == {getattr(torch, dtype)}
    assert largest_difference(models[0].state_dict(), models[1].state_dict()) < (0.05 if network == "half" else 1e-5)
    start = load_causal_model(two_ranks / "policy", dtype)
    assert largest_difference(start.state_dict(), models[0].state_dict()) > 1e-4


@pytest.mark.parametrize("data_parallel", ["ddp", "fsdp2"])
def test_peft_loads_the_adapter_beside_a_merged_policy(two_ranks: Path, data_parallel: str) -> None:
    folder = two_ranks / f"lora {data_parallel}" / "whole" / "step-3" / "policy"
    base = load_causal_model(two_ranks / "policy", "float32")
    token_ids = torch.arange(12)[None]
    with torch.no_grad():
        merged = load_causal_model(folder, "float32")(input_ids=token_ids).logits
        adapted = PeftModel.from_pretrained(base, str(folder / "adapter"))(input_ids=token_ids).logits
    torch.testing.assert_close(adapted, merged, atol=1e-5, rtol=0)


def test_no_checkpoint_holds_a_pickle(two_ranks: Path) -> None:
    files = [path for path in two_ranks.rglob("*") if path.is_file() and path.name != "rendezvous"]
    assert len(files) > 50
    assert not [path for path in files if path.read_bytes()[:2] in (b"\x80\x02", b"\x80\x04", b"\x80\x05", b"PK")]
