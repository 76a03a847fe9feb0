"""The tables of advantage estimators agree, and a function of the user's own trains a real step."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from cluster.errors import InputError, LearnerError
from deploy.config.functions import dotted_paths
from deploy.config.load import load_run_config
from learner.config import LearnerConfig, critic_of
from learner.estimators import ESTIMATORS, Needs, needs, needs_of
from learner.ppo import advantages as adv
from learner.ppo.batch import make_batch
from tests.learner.conftest import make_trajectory
from tests.learner.ppo.test_experience import computed, trajectories
from tests.learner.ppo.test_rllib import OneRank

RUN_FILE = """
[run]
stages = ["ppo"]
[model]
builder = "task:build"
[data]
builder = "task:data"
[reward_service]
scorer = "task:score"
"""
HERE = "tests.learner.ppo.test_estimators"


def mine(signals: adv.Signals) -> Tensor:
    """Return each response's reward minus a constant, on every token."""
    return torch.where(signals.mask, signals.rewards.sum(1, keepdim=True) - 0.5, 0.0)


@needs(critic=True, whitens=True)
def with_critic(signals: adv.Signals) -> tuple[Tensor, Tensor]:
    return adv.gae(signals.rewards, signals.values, signals.mask, gamma=1.0, lam=0.95)


def wrong_shape(signals: adv.Signals) -> Tensor:
    return signals.rewards.sum(1)


def test_both_tables_of_estimators_have_the_same_names() -> None:
    assert set(ESTIMATORS) == set(adv.FUNCTIONS)
    assert set(adv.BASELINES) <= set(ESTIMATORS)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_an_estimator_uses_what_it_declares_and_nothing_else(name: str) -> None:
    batch = make_batch(trajectories())
    plain, _ = computed(batch, advantages=name, whiten_advantages=False)
    one_group, _ = computed(
        replace(batch, groups=torch.zeros_like(batch.groups)), advantages=name, whiten_advantages=False
    )
    default, _ = computed(batch, advantages=name)
    assert bool(plain.returns.any()) == ESTIMATORS[name].critic
    assert torch.equal(plain.advantages, one_group.advantages) != ESTIMATORS[name].groups
    assert torch.equal(plain.advantages, default.advantages) != ESTIMATORS[name].whitens


def test_a_function_of_the_users_own_trains_a_real_step(policy_path: Path) -> None:
    config = LearnerConfig(num_epochs=4, learning_rate=1e-3, kl_coefficient=0.0, advantages=f"{HERE}:mine")
    assert critic_of(config) == "none"
    learner = OneRank(policy_path, config)
    rows = [replace(make_trajectory(i), reward=float(i % 2)) for i in range(16)]
    padded = make_batch(rows)
    before = learner.model(padded.token_ids, padded.mask, padded.lengths).logprobs.sum(1)
    for _ in range(3):
        metrics = learner.step(1, rows)
    gain = (learner.model(padded.token_ids, padded.mask, padded.lengths).logprobs.sum(1) - before).detach()
    assert gain[1::2].mean() > 0 > gain[::2].mean()
    assert metrics["learner/value_loss"] == 0


def test_a_function_of_the_users_own_declares_a_critic() -> None:
    name = f"{HERE}:with_critic"
    assert needs_of(name) == Needs(critic=True, whitens=True)
    assert critic_of(LearnerConfig(advantages=name, critic="separate")) == "separate"
    batch = make_batch(trajectories())
    own, _ = computed(batch, advantages=name)
    gae, _ = computed(batch, advantages="gae")
    assert torch.equal(own.advantages, gae.advantages)
    assert torch.equal(own.returns, gae.returns)


def test_the_check_of_a_run_file_looks_for_the_users_function(tmp_path: Path) -> None:
    run_file = tmp_path / "run.toml"
    run_file.write_text(RUN_FILE)
    lines = ['learner.advantages = "my_task.advantages:mine"', "rollout_actors.responses_per_prompt = 1"]
    assert dotted_paths(load_run_config(run_file, lines))["learner.advantages"] == "my_task.advantages:mine"
    assert "learner.advantages" not in dotted_paths(load_run_config(run_file, ['learner.advantages = "reinforce_pp"']))
    with pytest.raises(InputError, match=r"learner\.advantages: 'grop' is neither one of gae, grpo"):
        load_run_config(run_file, ['learner.advantages = "grop"'])


def test_an_unknown_or_wrong_estimator_is_named() -> None:
    with pytest.raises(ValidationError, match=r"'grop' is neither one of gae, grpo, .* nor a dotted path"):
        LearnerConfig(advantages="grop")
    with pytest.raises(InputError, match=r"learner\.advantages: .* has no function 'missing'"):
        adv.find_estimator(f"{HERE}:missing")
    with pytest.raises(LearnerError, match=r"learner\.advantages: it must return advantages of shape"):
        computed(make_batch(trajectories()), advantages=f"{HERE}:wrong_shape")
