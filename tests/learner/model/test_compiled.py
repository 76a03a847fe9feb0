"""Compiled layers and distributions match plain ones, and are compiled once for all packs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface

from learner.model import actor_critic
from learner.model import compiled as fusing
from learner.model.actor_critic import ActorCritic, ModelSettings
from learner.model.packing import PACKED, packed_attention
from tests.learner.conftest import VOCABULARY

PACKS = ([9, 12, 5], [20, 3], [7, 7, 7, 7], [30, 11], [16], [40, 2, 2])


@pytest.fixture
def attention_given_back() -> Iterator[None]:
    yield
    AttentionInterface.register(PACKED, packed_attention)


def outputs(model: ActorCritic, lengths: Sequence[int]) -> list[Tensor]:
    """Compute log-probabilities and entropies of a pack, and the gradients of their sum."""
    generator = torch.Generator().manual_seed(len(lengths))
    token_ids = torch.randint(VOCABULARY, (len(lengths), max(lengths)), generator=generator)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    mask[:, 0] = False
    model.zero_grad()
    found = model(token_ids, mask, lengths)
    (found.logprobs.sum() + found.entropy.sum()).backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    return [found.logprobs.detach(), found.entropy.detach(), *gradients]


@pytest.mark.usefixtures("attention_given_back")
def test_compiled_layers_are_exact_and_compiled_once_for_any_pack(
    policy_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_compiled = 0

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        nonlocal num_compiled
        num_compiled += 1
        return graph

    model = ActorCritic(ModelSettings(policy_path, "float32", "none", 0.7))
    plain = [outputs(model, pack) for pack in PACKS]
    fusing.fuse_layers(model, backend)
    compiled = torch.compile(fusing.distributions, dynamic=True, backend=backend)
    monkeypatch.setattr(actor_critic, "fused_distributions", lambda: compiled)
    model._is_fused = True
    for place, (pack, expected) in enumerate(zip(PACKS, plain, strict=True)):
        for found, wanted in zip(outputs(model, pack), expected, strict=True):
            torch.testing.assert_close(found, wanted)
        if place == 1:
            after_two = num_compiled
    assert after_two >= 3, "before attention, after it, and the distributions"
    assert num_compiled <= after_two + 2, (
        "none for the numbers of sequences and of tokens; for one sequence alone at most"
    )


def test_nothing_is_compiled_on_a_cpu(policy_path: Path) -> None:
    model = ActorCritic(ModelSettings(policy_path, "float32", "none", 0.7))
    outputs(model, [5, 6])
    assert not model._is_fused
    assert all(module._compiled_call_impl is None for module in model.modules())
