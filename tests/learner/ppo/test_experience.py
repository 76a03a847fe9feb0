"""Importance weights, advantages and metrics that a step computes before it trains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cluster.errors import InputError, LearnerError
from cluster.trajectory import Trajectory
from learner.config import ConstraintConfig, LearnerConfig
from learner.distributed.metrics import StepMetrics
from learner.distributed.ranks import Ranks
from learner.ppo import advantages as adv
from learner.ppo.batch import Batch, make_batch
from learner.ppo.experience import AdvantageComputer, Evaluation, Experience
from learner.ppo.experience_metrics import log_experience
from tests.learner.conftest import make_trajectory

ALONE = Ranks(torch.device("cpu"), distributed=False)


def trajectories(num: int = 8, *, lag: int = 0) -> list[Trajectory]:
    """Make pairs of responses to a prompt, at step 5; every second one `lag` versions old."""
    return [replace(make_trajectory(i, version=4 - lag * (i % 2)), group=i // 2) for i in range(num)]


def evaluation(batch: Batch, *, shift: float = 0.0) -> Evaluation:
    """Make proximal log-probabilities: behaviour plus `shift` on even rows, minus `shift` on odd ones."""
    shape, generator = batch.mask.shape, torch.Generator().manual_seed(0)
    sign = 1 - 2 * (torch.arange(len(batch.uids)) % 2)[:, None]
    proximal = torch.where(batch.mask, batch.behavior_logprobs + shift * sign, 0.0)
    reference = torch.where(batch.mask, proximal + 0.1 * torch.randn(shape, generator=generator), 0.0)
    values = torch.where(batch.mask, torch.randn(shape, generator=generator), 0.0)
    return Evaluation(batch, proximal, reference, values, torch.zeros(shape))


def computed(
    batch: Batch, *, shift: float = 0.0, tasks: Sequence[str] = (), **settings: Any
) -> tuple[Experience, dict[str, float]]:
    computer, metrics = AdvantageComputer(LearnerConfig(**settings), ALONE, tasks), StepMetrics(ALONE)
    experience = computer.compute(5, evaluation(batch, shift=shift))
    log_experience(5, experience, computer, ALONE, metrics)
    return experience, metrics.metrics()


def rewards_of(batch: Batch, made: Experience, coefficient: float) -> list[list[float]]:
    """Compute token rewards in plain Python: the KL penalty on every token, the score on the last."""
    rows = []
    for row in range(len(batch.uids)):
        tokens = batch.mask[row].nonzero()[:, 0].tolist()
        kl = [float(made.proximal[row, t] - made.reference[row, t]) for t in tokens]
        rows.append([-coefficient * value for value in kl])
        rows[-1][-1] += float(batch.scores[row])
    return rows


def on_tokens(values: Tensor, batch: Batch) -> list[list[float]]:
    return [values[row][batch.mask[row]].tolist() for row in range(len(batch.uids))]


def numbers(state: dict[str, Tensor]) -> dict[str, Any]:
    return {name: tensor.tolist() for name, tensor in state.items()}


@pytest.mark.parametrize("gamma", [1.0, 0.9])
@pytest.mark.parametrize("baseline", [True, False])
def test_reinforce_pp_gives_each_token_the_rewards_to_come(gamma: float, baseline: bool) -> None:
    batch = make_batch(trajectories())
    name = "reinforce_pp_baseline" if baseline else "reinforce_pp"
    made, _ = computed(batch, advantages=name, gamma=gamma, kl_coefficient=0.3, whiten_advantages=False)
    for row, rewards in enumerate(rewards_of(batch, made, 0.3)):
        if baseline:
            rewards[-1] -= float(batch.scores[row // 2 * 2] + batch.scores[row // 2 * 2 + 1]) / 2
        expected = [sum(gamma**k * r for k, r in enumerate(rewards[t:])) for t in range(len(rewards))]
        assert on_tokens(made.advantages, batch)[row] == pytest.approx(expected, abs=1e-5)


def test_reinforce_pp_is_whitened_over_the_whole_batch_and_grpo_is_not() -> None:
    batch = make_batch(trajectories())
    whitened, _ = computed(batch, advantages="reinforce_pp")
    chosen = whitened.advantages[batch.mask]
    assert float(chosen.mean()) == pytest.approx(0, abs=1e-5)
    assert float(chosen.std()) == pytest.approx(1, abs=1e-4)
    plain, _ = computed(batch, advantages="grpo", kl_coefficient=0.0)
    expected = adv.group_advantages(batch.scores, batch.groups, "grpo")
    assert [row[0] for row in on_tokens(plain.advantages, batch)] == pytest.approx(expected.tolist())


def test_lambda_grows_with_the_length_of_a_response() -> None:
    batch = make_batch(trajectories())
    lam = adv.length_adaptive_lambda(batch.mask, 0.5)
    lengths = batch.mask.sum(1)
    assert lam.tolist() == pytest.approx([max(0.0, 1 - 1 / (0.5 * float(n))) for n in lengths])
    made, _ = computed(batch, gae_lambda_alpha=0.5, whiten_advantages=False, kl_coefficient=0.0)
    rewards = adv.token_rewards(batch.scores, torch.zeros(batch.mask.shape), batch.mask, kl_coefficient=0.0)
    for row in range(len(lengths)):
        alone = [tensor[row : row + 1] for tensor in (rewards, made.values, batch.mask)]
        expected, _ = adv.gae(*alone, gamma=1.0, lam=float(lam[row]))
        torch.testing.assert_close(made.advantages[row : row + 1], expected)


def test_the_trust_region_is_around_the_sampling_policy_if_coupled() -> None:
    batch = make_batch(trajectories(lag=2))
    decoupled, metrics = computed(batch, shift=0.4)
    coupled, plain = computed(batch, shift=0.4, decoupled=False)
    assert torch.equal(decoupled.anchor, decoupled.proximal)
    assert torch.equal(coupled.anchor, batch.behavior_logprobs)
    assert set(coupled.importance[batch.mask].tolist()) == {1.0}
    weights = decoupled.importance[batch.mask]
    for row, expected in ((0, 0.4), (1, -0.4)):
        assert decoupled.importance[row][batch.mask[row]].log().tolist() == pytest.approx(
            [expected] * int(batch.mask[row].sum()), abs=1e-5
        )
    size = float(weights.sum() ** 2 / weights.square().sum()) / len(weights)
    assert metrics["learner/effective_sample_size"] == pytest.approx(size, rel=1e-5)
    assert plain["learner/effective_sample_size"] == 1.0


def test_lag_shares_and_engine_differences_are_logged() -> None:
    batch = make_batch(trajectories(lag=2))
    _, metrics = computed(batch, shift=0.4)
    fresh = batch.mask & (batch.versions == 4)
    share = float(fresh.sum() / batch.mask.sum())
    found = [metrics[f"cluster/policy_lag_share_{lag}"] for lag in range(3)]
    assert found == pytest.approx([share, 0.0, 1 - share])
    assert metrics["learner/engine_kl_nats_per_token"] == pytest.approx(2.718281828**0.4 - 1 - 0.4, rel=1e-4)


def test_the_engines_logprobs_are_not_used_at_lag_zero() -> None:
    batch = make_batch(trajectories())
    made, metrics = computed(batch, shift=0.4)
    assert set(made.importance[batch.mask].tolist()) == {1.0}
    assert metrics["cluster/policy_lag_share_0"] == 1.0
    expected = float(((made.proximal - made.reference) * batch.mask).sum(1).mean())
    assert metrics["learner/kl_nats"] == pytest.approx(expected, abs=1e-6)


def test_the_state_is_restored_and_a_missing_entry_named() -> None:
    settings = LearnerConfig(kl_target=1.0, normalize_rewards=True, constraint=ConstraintConfig(cost="cost"))
    computer, other = (AdvantageComputer(settings, ALONE) for _ in range(2))
    computer.compute(5, evaluation(make_batch(trajectories())))
    computer.steer_kl(9.0, 100)
    computer.steer_multiplier({"learner/cost_mean": 0.7})
    other.load(computer.state())
    assert {name: t.tolist() for name, t in other.state().items()} == {
        n: t.tolist() for n, t in computer.state().items()
    }
    assert other.kl_coefficient != LearnerConfig().kl_coefficient
    assert other.constraint_multiplier == pytest.approx(1.69)
    with pytest.raises(InputError, match="lacks 'reward_moments'"):
        other.load({"kl_coefficient": torch.tensor(0.1)})


def test_a_fixed_kl_coefficient_comes_from_the_settings() -> None:
    state = AdvantageComputer(LearnerConfig(kl_coefficient=0.1), ALONE).state()
    fixed, steered = (
        AdvantageComputer(LearnerConfig(kl_coefficient=0.3, kl_target=target), ALONE) for target in (None, 6.0)
    )
    fixed.load(state)
    steered.load(state)
    assert (fixed.kl_coefficient, steered.kl_coefficient) == (0.3, 0.1)


def of_two_tasks(num: int = 12) -> list[Trajectory]:
    """Make every third trajectory one of a task whose rewards are a hundred times larger."""
    plain = trajectories(num)
    return [replace(t, task="large", reward=100 * t.reward) if i % 3 == 0 else t for i, t in enumerate(plain)]  # type: ignore[operator]


@pytest.mark.parametrize("estimator", ["gae", "reinforce_pp"])
def test_advantages_are_whitened_per_task_or_over_the_batch(estimator: str) -> None:
    batch, tasks = make_batch(of_two_tasks()), ("large", "test")
    plain, _ = computed(batch, advantages=estimator, whiten_advantages=False)
    mask, raw = batch.mask.numpy(), plain.advantages.double().numpy()
    of_task = {task: np.array([[own == task] for own in batch.tasks]) & mask for task in tasks}
    for by, parts in (("task", list(of_task.values())), ("batch", [mask])):
        expected = np.zeros_like(raw)
        for part in parts:
            expected[part] = (raw[part] - raw[part].mean()) / np.sqrt(raw[part].var(ddof=1) + 1e-8)
        found, _ = computed(batch, advantages=estimator, normalize_by=by, tasks=tasks)
        np.testing.assert_allclose(found.advantages.numpy(), expected, atol=1e-4)
    alone, _ = computed(batch, advantages=estimator, normalize_by="task")
    assert torch.equal(alone.advantages, found.advantages)


def test_a_tasks_reward_scale_does_not_matter_if_normalised_by_task() -> None:
    settings: dict[str, Any] = {"advantages": "reinforce_pp", "normalize_rewards": True, "kl_coefficient": 0.0}
    many, tasks = of_two_tasks(), ("large", "test")
    few = [replace(t, task="test", reward=t.reward / 100) if t.task == "large" else t for t in many]  # type: ignore[operator]
    made, _ = computed(make_batch(many), tasks=tasks, whiten_advantages=False, **settings)
    for task in tasks:
        own = [i for i, t in enumerate(many) if t.task == task]
        alone, _ = computed(make_batch([few[i] for i in own]), whiten_advantages=False, **settings)
        firsts = [row[0] for row in on_tokens(made.advantages, make_batch(many))]
        expected = [row[0] for row in on_tokens(alone.advantages, make_batch([few[i] for i in own]))]
        assert [firsts[i] for i in own] == pytest.approx(expected, abs=1e-4)


def test_each_tasks_statistics_are_restored_and_a_missing_one_named() -> None:
    config, tasks = LearnerConfig(normalize_rewards=True), ("large", "test")
    computer, other = (AdvantageComputer(config, ALONE, tasks) for _ in range(2))
    computer.compute(5, evaluation(make_batch(of_two_tasks())))
    state = computer.state()
    assert set(state) == {"kl_coefficient", "reward_moments.large", "reward_moments.test"}
    assert [state[f"reward_moments.{task}"][0].item() for task in tasks] == [4, 8]
    other.load(state)
    assert numbers(other.state()) == numbers(state)
    with pytest.raises(InputError, match=r"lacks 'reward_moments\.test'"):
        other.load({name: tensor for name, tensor in state.items() if name != "reward_moments.test"})


def test_an_error_names_a_trajectory_of_an_unknown_task() -> None:
    batch = make_batch(of_two_tasks(4))
    AdvantageComputer(LearnerConfig(), ALONE, ("test", "large")).require_known(batch)
    AdvantageComputer(LearnerConfig(), ALONE).require_known(batch)
    with pytest.raises(LearnerError, match=f"trajectory {batch.uids[0]}: its task is none of test, other") as error:
        AdvantageComputer(LearnerConfig(), ALONE, ("test", "other")).require_known(batch)
    assert error.value.uids == (batch.uids[0], batch.uids[3])
