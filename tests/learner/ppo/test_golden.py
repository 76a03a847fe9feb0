"""Functions match verl, OpenRLHF and TRL on one set of inputs, to 1e-6 in float64."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from learner.ppo import advantages as adv
from learner.ppo import losses

VECTORS = json.loads((Path(__file__).parent / "ppo_vectors.json").read_text())
INPUTS: dict[str, Any] = {
    name: torch.tensor(value, dtype=torch.float64) if isinstance(value, list) else value
    for name, value in VECTORS["inputs"].items()
}
MASK = INPUTS["mask"].bool()
COUNT = float(MASK.sum())


def assert_golden(actual: Tensor | float, name: str) -> None:
    expected = torch.tensor(VECTORS["outputs"][name], dtype=torch.float64)
    torch.testing.assert_close(torch.as_tensor(actual, dtype=torch.float64), expected, atol=1e-6, rtol=0)


def token_rewards() -> Tensor:
    kl = adv.kl_k1(INPUTS["behavior_logprobs"], INPUTS["reference_logprobs"])
    return adv.token_rewards(INPUTS["scores"], kl, MASK, kl_coefficient=INPUTS["kl_coefficient"])


def advantages_and_returns() -> tuple[Tensor, Tensor]:
    return adv.gae(token_rewards(), INPUTS["values"], MASK, gamma=INPUTS["gamma"], lam=INPUTS["lam"])


def whitened() -> Tensor:
    advantages, _ = advantages_and_returns()
    return adv.whiten(advantages, MASK, adv.masked_moments(advantages, MASK))


def policy_loss(**clips: Any) -> losses.PolicyLoss:
    return losses.policy_loss(
        INPUTS["policy_logprobs"],
        proximal_logprobs=INPUTS["behavior_logprobs"],
        advantages=whitened(),
        mask=MASK,
        clip=INPUTS["clip"],
        **clips,
    )


@pytest.mark.parametrize(("name", "estimator"), [("kl_k1", adv.kl_k1), ("kl_k2", adv.kl_k2), ("kl_k3", adv.kl_k3)])
def test_kl_estimators_match_verl_and_openrlhf(name: str, estimator: Any) -> None:
    kl = estimator(INPUTS["behavior_logprobs"], INPUTS["reference_logprobs"])
    assert_golden(torch.where(MASK, kl, 0.0), name)


def test_token_rewards_have_the_score_at_the_last_unmasked_token() -> None:
    assert_golden(token_rewards(), "token_rewards")


def test_gae_carries_its_accumulators_over_a_masked_gap() -> None:
    advantages, returns = advantages_and_returns()
    assert_golden(advantages, "advantages")
    assert_golden(returns, "returns")


def test_whitening_is_masked_and_unbiased() -> None:
    assert_golden(whitened(), "advantages_whitened")


def test_the_clipped_policy_loss_is_a_mean_over_tokens() -> None:
    terms = policy_loss()
    assert_golden(losses.token_mean(terms.loss, MASK, COUNT), "policy_loss_token-mean")
    assert_golden(losses.token_mean(terms.is_clipped.double(), MASK, COUNT), "clip_fraction")
    drift = INPUTS["behavior_logprobs"] - INPUTS["policy_logprobs"]
    assert_golden(losses.token_mean(drift, MASK, COUNT), "approx_kl")


def test_the_value_loss_is_clipped_and_halved() -> None:
    _, returns = advantages_and_returns()
    old_values, clip = INPUTS["values"], INPUTS["value_clip"]
    terms = losses.value_loss(INPUTS["new_values"], old_values=old_values, returns=returns, clip=clip)
    assert_golden(losses.token_mean(terms.loss, MASK, COUNT), "value_loss")
    assert_golden(losses.token_mean(terms.is_clipped.double(), MASK, COUNT), "value_clip_fraction")


@pytest.mark.parametrize(
    ("clips", "name"),
    [({"clip_high": 0.28}, "policy_loss_clip_higher_0.28"), ({"dual_clip": 1.2}, "policy_loss_dual_clip_1.2")],
)
def test_clip_higher_and_dual_clip_match_verl(clips: dict[str, float], name: str) -> None:
    assert_golden(losses.token_mean(policy_loss(**clips).loss, MASK, COUNT), name)


@pytest.mark.parametrize(
    ("aggregation", "name"),
    [
        ("token_mean", "policy_loss_token-mean"),
        ("sequence_mean_token_sum", "policy_loss_seq-mean-token-sum"),
        ("sequence_mean_token_mean", "policy_loss_seq-mean-token-mean"),
    ],
)
def test_aggregations_match_verl(aggregation: losses.Aggregation, name: str) -> None:
    loss = losses.aggregate(policy_loss().loss, MASK, aggregation, num_tokens=COUNT, num_sequences=len(MASK))
    assert_golden(loss, name)


@pytest.mark.parametrize("estimator", ["grpo", "rloo"])
def test_group_advantages_match_verl(estimator: Any) -> None:
    groups = INPUTS["groups"].long()
    assert_golden(adv.group_advantages(INPUTS["group_rewards"], groups, estimator), f"{estimator}_advantages")


def test_the_adaptive_kl_coefficient_matches_verl() -> None:
    coefficient, found = 0.15, []
    for kl in (3.0, 9.0, 6.0, 6.6):
        coefficient = adv.adapted_kl_coefficient(coefficient, kl, target=6.0, horizon=1e4, num_episodes=512)
        found.append(coefficient)
    assert_golden(torch.tensor(found), "adaptive_kl_start0.15_target6_horizon1e4_n512_kl_3_9_6_6.6")
