"""The bound on the mean cost: multiplier and rewards match plain Python and closed forms."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import InputError, LearnerError
from cluster.trajectory import Trajectory
from learner.config import ConstraintConfig, LearnerConfig
from learner.ppo.batch import make_batch
from learner.ppo.constraint import updated_multiplier
from learner.ppo.experience import AdvantageComputer
from tests.learner.conftest import make_trajectory, make_two_turn_trajectory, write_policy
from tests.learner.ppo.test_bandit import BETA, REWARDS, distribution, sampled
from tests.learner.ppo.test_experience import ALONE, computed, on_tokens, rewards_of
from tests.learner.ppo.test_rllib import OneRank
from tests.support import ppo_ranks

COSTS = (REWARDS > 0.9).double()
"""Costs of the bandit's tokens: those with the highest rewards are forbidden."""


def bounded(**settings: Any) -> dict[str, Any]:
    return {"constraint": ConstraintConfig(cost="cost", **settings)}


def costing(cost: float, num: int = 8) -> list[Trajectory]:
    return [replace(make_trajectory(i), reward_parts={"cost": cost, "other": -cost}) for i in range(num)]


def multipliers(batches: list[list[float]], settings: ConstraintConfig) -> list[float]:
    """Compute the multiplier after each batch, response by response, with explicit conditions as bounds."""
    found, multiplier = [], settings.initial_multiplier
    for costs in batches:
        for cost in costs:
            multiplier += settings.learning_rate / len(costs) * (cost - settings.max_mean)
        if multiplier < 0:
            multiplier = 0.0
        elif settings.max_multiplier is not None and multiplier > settings.max_multiplier:
            multiplier = settings.max_multiplier
        found.append(multiplier)
    return found


@given(
    st.lists(st.lists(st.floats(-2, 2), min_size=1, max_size=4), min_size=1, max_size=8),
    st.floats(-1, 1),
    st.floats(0.01, 20),
    st.sampled_from([None, 1.0, 5.0]),
)
def test_the_multiplier_ascends_the_dual_within_its_bounds(
    batches: list[list[float]], max_mean: float, learning_rate: float, largest: float | None
) -> None:
    settings = ConstraintConfig(cost="cost", max_mean=max_mean, learning_rate=learning_rate, max_multiplier=largest)
    multiplier, found = settings.initial_multiplier, []
    for costs in batches:
        multiplier = updated_multiplier(multiplier, fmean(costs), settings)
        found.append(multiplier)
    assert found == pytest.approx(multipliers(batches, settings), rel=1e-9, abs=1e-9)


def test_the_multiplier_rises_above_the_bound_and_falls_below_it() -> None:
    settings = ConstraintConfig(cost="cost", max_mean=0.1, learning_rate=2.0, max_multiplier=1.5)
    assert updated_multiplier(1.0, 0.2, settings) == pytest.approx(1.2)
    assert updated_multiplier(1.0, 0.1, settings) == 1.0
    assert updated_multiplier(1.0, 0.0, settings) == pytest.approx(0.8)
    assert updated_multiplier(0.1, 0.0, settings) == 0.0
    assert updated_multiplier(1.0, 1.0, settings) == 1.5


def constrained_rewards(row: int, made: Any, *, kl: float, multiplier: float) -> list[float]:
    """Compute a row's token rewards: (reward - lambda cost - KL penalty) / (1 + lambda)."""
    rewards = rewards_of(made.batch, made, kl)[row]
    tokens = made.batch.mask[row].nonzero()[:, 0].tolist()
    rewards = [r + float(made.batch.turn_rewards[row, t]) for r, t in zip(rewards, tokens, strict=True)]
    rewards[-1] -= multiplier * float(made.batch.costs[row])
    return [reward / (1 + multiplier) for reward in rewards]


@pytest.mark.parametrize("multiplier", [0.0, 0.5, 30.0])
def test_rewards_are_reward_less_weighted_cost_over_one_plus_weight(multiplier: float) -> None:
    trajectories = [*(make_trajectory(i, version=4) for i in range(3)), make_two_turn_trajectory(3, version=3)]
    batch = make_batch(trajectories, cost="cost")
    settings = bounded(initial_multiplier=multiplier)
    made, metrics = computed(batch, advantages="reinforce_pp", kl_coefficient=0.3, whiten_advantages=False, **settings)
    for row in range(len(trajectories)):
        rewards = constrained_rewards(row, made, kl=0.3, multiplier=multiplier)
        expected = [sum(rewards[t:]) for t in range(len(rewards))]
        assert on_tokens(made.advantages, batch)[row] == pytest.approx(expected, abs=1e-5)
    assert metrics["learner/constraint_multiplier"] == multiplier
    assert metrics["learner/cost_mean"] == pytest.approx(fmean(t.reward_parts["cost"] for t in trajectories))


def test_group_advantages_include_the_costs() -> None:
    trajectories = [replace(make_trajectory(i, version=4), group=i // 2) for i in range(4)]
    batch = make_batch(trajectories, cost="cost")
    found, _ = computed(batch, advantages="dr_grpo", kl_coefficient=0.0, **bounded(initial_multiplier=2.0))
    worth = [(float(t.reward or 0.0) - 2 * t.reward_parts["cost"]) / 3 for t in trajectories]
    expected = [worth[i] - (worth[i // 2 * 2] + worth[i // 2 * 2 + 1]) / 2 for i in range(4)]
    assert [row[0] for row in on_tokens(found.advantages, batch)] == pytest.approx(expected, abs=1e-6)


def test_whitened_advantages_do_not_depend_on_the_division() -> None:
    batch = make_batch([make_trajectory(i, version=4) for i in range(6)], cost="cost")
    found, _ = computed(batch, advantages="reinforce_pp", kl_coefficient=0.2, **bounded(initial_multiplier=4.0))
    plain = replace(batch, scores=batch.scores - 4 * batch.costs)
    expected, _ = computed(plain, advantages="reinforce_pp", kl_coefficient=0.2)
    torch.testing.assert_close(found.advantages, expected.advantages, atol=1e-5, rtol=1e-5)


def test_costs_are_not_read_logged_or_saved_without_a_bound() -> None:
    batch = make_batch([replace(make_trajectory(i, version=4), reward_parts={}) for i in range(4)])
    made, metrics = computed(batch)
    assert batch.costs.tolist() == [0.0] * 4
    assert not {"learner/cost_mean", "learner/constraint_multiplier"} & metrics.keys()
    assert "constraint_multiplier" not in AdvantageComputer(LearnerConfig(), ALONE).state()
    assert not made.advantages.isnan().any()


@pytest.mark.parametrize(
    ("parts", "found"),
    [
        ({}, "there are none"),
        ({"b": 1.0, "a": 0.0}, "there are a, b"),
        ({"cost": float("nan")}, "it is nan"),
        ({"cost": float("inf")}, "it is inf"),
    ],
)
def test_an_error_names_a_response_without_a_cost(policy_path: Path, parts: dict[str, float], found: str) -> None:
    learner = OneRank(policy_path, LearnerConfig(**bounded()))
    before = learner.weights()
    trajectories = costing(1.0)
    trajectories[3] = replace(trajectories[3], reward_parts=parts)
    message = rf"trajectory 0-3-0: its reward has no finite part 'cost' \(learner.constraint.cost\): {found}"
    with pytest.raises(LearnerError, match=message) as failure:
        learner.step(1, trajectories)
    assert failure.value.uids == ("0-3-0",)
    assert all(torch.equal(tensor, before[name]) for name, tensor in learner.weights().items())


def test_each_step_uses_the_multiplier_of_the_steps_before_it(policy_path: Path) -> None:
    learner = OneRank(policy_path, LearnerConfig(**bounded(max_mean=0.25, learning_rate=2.0)))
    costs = [1.0, 0.5, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0]
    metrics = [learner.step(step, costing(cost)) for step, cost in enumerate(costs, 1)]
    assert [row["learner/cost_mean"] for row in metrics] == costs
    found = [row["learner/constraint_multiplier"] for row in metrics]
    assert found == pytest.approx([1.0, 2.5, 3.0, 2.5, 2.0, 1.5, 1.0, 0.5])


def test_a_bound_needs_a_checkpoint_of_a_run_with_one(policy_path: Path, tmp_path: Path) -> None:
    with_bound = ppo_ranks.settings(policy_path, "separate", "ddp", tmp_path / "step-2")
    config = with_bound.config.model_copy(update={"constraint": ConstraintConfig()})
    place = replace(with_bound.place, checkpoint_path=None)
    rank = ppo_ranks.make_rank(replace(with_bound, config=config, version=0, place=place), ALONE)
    for step in (1, 2):
        rank.update(step, ppo_ranks.share(step, 0, 1))
    rank.save_checkpoint(tmp_path / "step-2", {})
    with pytest.raises(InputError, match="step-2: has no constraint_multiplier: it was made with other settings"):
        ppo_ranks.make_rank(with_bound, ALONE)


@pytest.mark.slow
def test_the_policy_reaches_the_constrained_optimum(tmp_path: Path) -> None:
    """pi_ref(a) exp((r(a) - lambda c(a)) / beta) / Z with the lambda at which the mean cost is the bound."""
    max_mean, num_steps = 0.1, 60
    learner = OneRank(write_policy(tmp_path / "policy"), bandit_settings(num_steps, max_mean=max_mean))
    start, generator = distribution(learner), torch.Generator().manual_seed(0)
    optimum = best_within(start, max_mean)
    assert min(cost_of(start), cost_of(best_within(start, 1.0))) > 3 * max_mean
    for step in range(1, num_steps + 1):
        metrics = learner.step(step, with_costs(sampled(distribution(learner), step, generator)))
    end = distribution(learner)
    assert cost_of(end) == pytest.approx(max_mean, abs=0.02)
    assert float((end * REWARDS).sum()) > float((start * REWARDS).sum()) + 0.35
    assert float((end - optimum).abs().sum() / 2) < 0.04
    assert metrics["learner/constraint_multiplier"] > 0


@pytest.mark.slow
def test_an_inactive_bound_does_not_change_the_optimum(tmp_path: Path) -> None:
    num_steps = 50
    learner = OneRank(write_policy(tmp_path / "policy"), bandit_settings(num_steps, max_mean=0.99))
    optimum, generator = best_within(distribution(learner), 1.0), torch.Generator().manual_seed(0)
    for step in range(1, num_steps + 1):
        metrics = learner.step(step, with_costs(sampled(distribution(learner), step, generator)))
    assert metrics["learner/constraint_multiplier"] == 0.0
    assert float((distribution(learner) - optimum).abs().sum() / 2) < 0.02


def bandit_settings(num_steps: int, *, max_mean: float) -> LearnerConfig:
    return LearnerConfig(
        num_epochs=2,
        num_minibatches=2,
        learning_rate=5e-3,
        learning_rate_schedule="linear",
        num_steps=num_steps,
        kl_coefficient=BETA,
        whiten_advantages=False,
        **bounded(max_mean=max_mean, learning_rate=1.0),
    )


def with_costs(trajectories: list[Trajectory]) -> list[Trajectory]:
    return [replace(t, reward_parts={"cost": float(COSTS[t.token_ids[-1]])}) for t in trajectories]


def cost_of(policy: torch.Tensor) -> float:
    return float((policy * COSTS).sum())


def best_within(start: torch.Tensor, max_mean: float) -> torch.Tensor:
    """Find the multiplier by bisection: the mean cost falls as it rises."""
    low, high = 0.0, 100.0
    for _ in range(60):
        multiplier = (low + high) / 2
        policy = start * ((REWARDS - multiplier * COSTS) / BETA).exp()
        policy /= policy.sum()
        low, high = (low, multiplier) if cost_of(policy) <= max_mean else (multiplier, high)
    return policy
