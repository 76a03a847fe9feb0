"""On a GPU: flash attention of packs, and whole steps, against the same without them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from learner.config import LearnerConfig
from learner.distributed.ranks import Ranks
from learner.model.actor_critic import ActorCritic, ModelSettings, Reference
from learner.model.packing import make_pack, packed_attention
from learner.place import Place
from learner.ppo.batch import make_batch
from learner.ppo.rank import LearnerSettings
from learner.ppo.shares import Share
from learner.ppo.step import PPOStep
from tests.learner.conftest import make_trajectory, write_policy

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

CONFIG = LearnerConfig(num_epochs=2, num_minibatches=2, learning_rate=0.03, entropy_coefficient=0.01)
NUM_TRAJECTORIES = 24
TOLERANCE = {"float32": 1e-3, "bfloat16": 1e-1}
UNCLIPPED = {"clip": 10.0, "value_clip": 10.0}
"""In half precision one token inside or outside a clip changes the update of the weights by a tenth."""


@pytest.fixture(scope="module")
def grouped_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy whose two query heads share a key and value head, of a size for flash attention."""
    path = tmp_path_factory.mktemp("grouped") / "policy"
    return write_policy(path, hidden_size=128, intermediate_size=256, num_key_value_heads=1, initializer_range=0.05)


class Steps(NamedTuple):
    """The last of two steps' metrics, and the change of all weights, as one vector on the CPU."""

    metrics: dict[str, float]
    moved: torch.Tensor


def two_steps(path: Path, device: str, dtype: str, **changed: Any) -> Steps:
    """Train two steps by plain gradient descent, so that the weights' change shows the gradients."""
    config, place = CONFIG.model_copy(update=changed), torch.device(device)
    model = ActorCritic(LearnerSettings(config, Place(path, dtype), 0.7).model()).to(place)
    frozen = ActorCritic(ModelSettings(path, dtype, "none", 0.7, is_trained=False)).to(place).requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=config.learning_rate)
    ranks = Ranks(place, distributed=False)
    step = PPOStep(config, model, Reference(frozen), optimizer, ranks, device=place, seed=0)
    before = flat(model)
    for number in (1, 2):
        trajectories = [make_trajectory(index, seed=number) for index in range(NUM_TRAJECTORIES)]
        metrics = step.run(number, Share(trajectories, range(NUM_TRAJECTORIES), NUM_TRAJECTORIES))
    return Steps(metrics, flat(model) - before)


def flat(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().double().cpu().reshape(-1) for parameter in model.parameters()])


def assert_alike(first: Steps, second: Steps, tolerance: float) -> None:
    """Compare metrics, except one token at a clip, and weights relative to their change."""
    assert first.metrics == pytest.approx(second.metrics, rel=tolerance, abs=1e-2)
    assert (first.moved - second.moved).norm() < tolerance * second.moved.norm()


def test_flash_attention_matches_plain_attention_of_each_sequence() -> None:
    lengths, device = [5, 64, 1, 30], torch.device("cuda")
    shapes = [(1, heads, sum(lengths), 64) for heads in (4, 2, 2)]
    query, key, value = (torch.randn(s, device=device, dtype=torch.bfloat16) for s in shapes)
    found, _ = packed_attention(torch.nn.Module(), query, key, value, None, pack=make_pack(lengths, device))
    start = 0
    for length in lengths:
        q, k, v = (tensor[:, :, start : start + length] for tensor in (query, key, value))
        expected = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
        torch.testing.assert_close(found[:, start : start + length], expected, atol=2e-2, rtol=2e-2)
        start += length


def test_the_gradient_of_flash_attention_matches_plain_attention() -> None:
    lengths, device = [9, 33, 2], torch.device("cuda")
    shapes = [(1, heads, sum(lengths), 64) for heads in (4, 2, 2)]
    whole = [torch.randn(s, device=device, dtype=torch.bfloat16, requires_grad=True) for s in shapes]
    weight = torch.randn(1, sum(lengths), 4, 64, device=device)
    query, key, value = whole
    found, _ = packed_attention(torch.nn.Module(), query, key, value, None, pack=make_pack(lengths, device))
    gradients = torch.autograd.grad((found * weight).sum(), whole)
    parts = zip(*(tensor.split(lengths, 2) for tensor in whole), strict=True)
    rows = [scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2) for q, k, v in parts]
    expected = torch.autograd.grad((torch.cat(rows, 1) * weight).sum(), whole)
    for gradient, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, other, atol=4e-2, rtol=4e-2)


def test_packed_and_padded_outputs_match_in_half_precision(grouped_path: Path) -> None:
    device = torch.device("cuda")
    batch = make_batch([make_trajectory(index) for index in range(NUM_TRAJECTORIES)], device=device)
    settings = ModelSettings(grouped_path, "bfloat16", "none", 0.7)
    with torch.no_grad():
        packed, padded = (
            ActorCritic(replace(settings, packing=packing)).to(device)(batch.token_ids, batch.mask, batch.lengths)
            for packing in (True, False)
        )
    torch.testing.assert_close(packed.logprobs, padded.logprobs, atol=5e-2, rtol=0)
    assert (packed.logprobs - padded.logprobs)[batch.mask].abs().mean() < 1e-2


def test_steps_on_a_gpu_match_those_on_a_cpu(grouped_path: Path) -> None:
    on_gpu, on_cpu = (two_steps(grouped_path, device, "float32") for device in ("cuda", "cpu"))
    assert_alike(on_gpu, on_cpu, TOLERANCE["float32"])


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_micro_batches_of_any_size_give_the_same_steps(grouped_path: Path, dtype: str) -> None:
    clips = UNCLIPPED if dtype == "bfloat16" else {}
    whole, cut = (two_steps(grouped_path, "cuda", dtype, micro_batch_tokens=n, **clips) for n in (16_384, 40))
    assert_alike(whole, cut, TOLERANCE[dtype])


def test_repeated_steps_match_in_half_precision(grouped_path: Path) -> None:
    first, second = (two_steps(grouped_path, "cuda", "bfloat16") for _ in range(2))
    assert_alike(first, second, TOLERANCE["bfloat16"])


@pytest.mark.parametrize("settings", [{"activation_checkpointing": True}, {"packing": False}])
def test_settings_that_save_memory_or_time_change_no_step(grouped_path: Path, settings: dict[str, Any]) -> None:
    plain, other = (two_steps(grouped_path, "cuda", "float32", **changes) for changes in ({}, settings))
    assert_alike(plain, other, TOLERANCE["float32"])
