"""Advantages match slow versions written token by token, also in edge cases."""

from __future__ import annotations

import math
import random
import statistics
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from learner.ppo import advantages as adv


def slow_gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> list[list[float]]:
    """Compute eq. 16 of arXiv:1506.02438: the sum of (gamma lam)^k delta_{t+k} over sampled tokens."""
    advantages = [[0.0] * values.shape[1] for _ in values]
    for row in range(values.shape[0]):
        sampled = [t for t in range(values.shape[1]) if mask[row, t]]
        reward = [float(rewards[row, t]) for t in sampled]
        value = [float(values[row, t]) for t in sampled] + [0.0]
        deltas = [reward[k] + gamma * value[k + 1] - value[k] for k in range(len(sampled))]
        for k, t in enumerate(sampled):
            advantages[row][t] = sum((gamma * lam) ** j * delta for j, delta in enumerate(deltas[k:]))
    return advantages


def random_inputs(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(2, 6, 11, dtype=torch.float64, generator=generator).unbind()
    mask = torch.rand(6, 11, generator=generator) < 0.6
    mask[0] = True
    mask[1] = False
    garbage = torch.full_like(values, math.nan)
    return torch.where(mask, rewards, garbage), torch.where(mask, values, garbage), mask


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 1.0), (0.99, 0.0)])
def test_gae_is_the_papers_sum_over_sampled_tokens_only(seed: int, gamma: float, lam: float) -> None:
    rewards, values, mask = random_inputs(seed)
    advantages, returns = adv.gae(rewards, values, mask, gamma=gamma, lam=lam)
    expected = torch.tensor(slow_gae(rewards, values, mask, gamma, lam), dtype=torch.float64)
    torch.testing.assert_close(advantages, expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(returns, torch.where(mask, expected + values, 0.0), atol=1e-12, rtol=0)


def test_the_score_is_at_the_last_token_and_turn_rewards_at_turns() -> None:
    mask = torch.tensor([[False, True, True, False, True], [False, True, False, False, False], [False] * 5])
    turn_rewards = torch.tensor([[9.0, 0.0, 0.5, 9.0, -1.0], [9.0, 2.0, 9.0, 9.0, 9.0], [9.0] * 5])
    kl = torch.tensor([[math.nan, 1.0, -2.0, math.nan, 3.0], [math.nan, 1.0] + [math.nan] * 3, [math.nan] * 5])
    rewards = adv.token_rewards(
        torch.tensor([10.0, 20.0, 30.0]), kl, mask, kl_coefficient=0.1, turn_rewards=turn_rewards
    )
    expected = torch.tensor([[0.0, -0.1, 0.7, 0.0, 8.7], [0.0, 21.9, 0.0, 0.0, 0.0], [0.0] * 5])
    torch.testing.assert_close(rewards, expected)


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_whitening_over_ranks_equals_whitening_of_the_batch(num_ranks: int) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(6, 5, dtype=torch.float64, generator=generator)
    mask = torch.rand(6, 5, generator=generator) < 0.7
    pieces = list(zip(values.chunk(num_ranks), mask.chunk(num_ranks), strict=True))

    count = sum(float(m.sum()) for _, m in pieces)
    mean = sum(float(v[m].sum()) for v, m in pieces) / count
    calls = iter([None] * 2)

    def sum_of_all(own: Tensor) -> Tensor:
        """Stand in for the other ranks: first counts and sums, then squared deviations."""
        if own.ndim:
            return torch.stack([torch.stack([m.sum().double(), v[m].sum()]) for v, m in pieces]).sum(0)
        next(calls)
        return torch.stack([(v[m] - mean).square().sum() for v, m in pieces]).sum()

    whole = values[mask]
    expected = (whole - whole.mean()) / (whole.var(unbiased=True) + 1e-8).sqrt()
    moments = adv.masked_moments(*pieces[0], sum_of_all)
    torch.testing.assert_close(adv.whiten(values, mask, moments)[mask], expected, atol=1e-12, rtol=0)


def test_whitening_of_equal_values_one_value_or_none_is_finite() -> None:
    for mask in ([[True, True, True]], [[True, False, False]], [[False, False, False]]):
        chosen = torch.tensor(mask)
        values = torch.full((1, 3), 2.5)
        whitened = adv.whiten(values, chosen, adv.masked_moments(values, chosen))
        assert torch.equal(whitened, torch.zeros(1, 3))


@given(st.integers(0, 99), st.integers(1, 3), st.integers(1, 4))
def test_whitening_by_parts_whitens_each_part_over_all_ranks(seed: int, num_ranks: int, num: int) -> None:
    draw = np.random.default_rng(seed)
    values, mask, part = draw.normal(size=(6, 5)), draw.random((6, 5)) < 0.7, draw.integers(0, num, 6)
    values += 100.0 * part[:, None]
    expected = np.zeros_like(values)
    for number in range(num):
        chosen = mask & (part == number)[:, None]
        if chosen.any():
            own = values[chosen]
            variance = own.var(ddof=1) if len(own) > 1 else 0.0
            expected[chosen] = (own - own.mean()) / np.sqrt(variance + 1e-8)
    masks = [torch.from_numpy(mask & (part == number)[:, None]) for number in range(num)]
    found = [
        adv.whiten_parts(rows, [own.chunk(num_ranks)[rank] for own in masks], gathered(values, masks, num_ranks))
        for rank, rows in enumerate(torch.from_numpy(values).chunk(num_ranks))
    ]
    np.testing.assert_allclose(torch.cat(found).numpy(), expected, atol=1e-9)


def gathered(values: np.ndarray, masks: list[Tensor], num_ranks: int) -> adv.AllSum:
    """Stand in for all ranks: per part first counts and sums, then squared deviations."""
    sums = []
    for mask in masks:
        pieces = zip(torch.from_numpy(values).chunk(num_ranks), mask.chunk(num_ranks), strict=True)
        own = [v[m] for v, m in pieces]
        mean = torch.cat(own).sum() / max(1, sum(map(len, own)))
        sums.append(torch.stack([torch.stack([torch.tensor(float(len(v))), v.sum()]).double() for v in own]).sum(0))
        sums.append(torch.stack([(v - mean).square().sum() for v in own]).sum())
    calls = iter(sums)
    return lambda own: next(calls)


def test_explained_variance_is_one_if_perfect_and_zero_if_constant() -> None:
    returns = torch.tensor([[1.0, 2.0, 5.0]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    assert adv.explained_variance(returns - 3, returns, mask) == pytest.approx(1.0)
    assert adv.explained_variance(torch.zeros(1, 3), returns, mask) == pytest.approx(0.0)
    assert adv.explained_variance(-returns, returns, mask) == pytest.approx(-3.0)
    assert adv.explained_variance(returns, torch.ones(1, 3), mask) == 0.0


def test_k3_is_never_negative_and_estimators_vanish_at_equality() -> None:
    draw = random.Random(0)
    p = torch.tensor([draw.uniform(-5, 0) for _ in range(100)], dtype=torch.float64)
    q = torch.tensor([draw.uniform(-5, 0) for _ in range(100)], dtype=torch.float64)
    assert (adv.kl_k3(p, q) >= 0).all()
    for estimator in (adv.kl_k1, adv.kl_k2, adv.kl_k3):
        assert torch.equal(estimator(p, p), torch.zeros(100, dtype=torch.float64))


@pytest.mark.parametrize("estimator", ["grpo", "dr_grpo", "rloo"])
@given(
    rewards=st.lists(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=5), min_size=1, max_size=4),
    seed=st.integers(0, 99),
)
def test_a_response_is_compared_with_its_group_in_any_order(
    estimator: Any, rewards: list[list[float]], seed: int
) -> None:
    rows = [(7 * group, reward) for group, of_group in enumerate(rewards) for reward in of_group]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    shuffled = [rows[i] for i in order]
    found = adv.group_advantages(
        torch.tensor([reward for _, reward in shuffled], dtype=torch.float64),
        torch.tensor([group for group, _ in shuffled]),
        estimator,
    )
    for (group, reward), advantage in zip(shuffled, found.tolist(), strict=True):
        assert advantage == pytest.approx(slow_group_advantage(reward, rewards[group // 7], estimator), abs=1e-6)


def slow_group_advantage(reward: float, group: list[float], estimator: str) -> float:
    if len(group) == 1:
        return 0.0
    if estimator == "rloo":
        others = (sum(group) - reward) / (len(group) - 1)
        return reward - others
    centred = reward - sum(group) / len(group)
    return centred if estimator == "dr_grpo" else centred / (statistics.stdev(group) + 1e-6)


@pytest.mark.parametrize("estimator", ["grpo", "dr_grpo", "rloo"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(
    reward=st.floats(-1e6, 1e6, allow_subnormal=False),
    num=st.integers(1, 9),
    errors=st.lists(st.integers(-1, 1), min_size=9, max_size=9),
)
def test_rewards_equal_but_for_rounding_give_exactly_zero(
    estimator: Any, dtype: torch.dtype, reward: float, num: int, errors: list[int]
) -> None:
    rewards = torch.tensor([reward * (1 + error * 2**-23) for error in errors[:num]], dtype=dtype)
    rewards, groups = torch.cat([rewards, torch.tensor([0.0, 1.0], dtype=dtype)]), torch.tensor([3] * num + [4] * 2)
    found = adv.group_advantages(rewards, groups, estimator)
    assert found[:num].tolist() == [0.0] * num
    assert found[num] < 0 < found[num + 1], "another group keeps its advantages"


@pytest.mark.parametrize("value", [0.1, 1e6, -3.3])
def test_whitening_values_equal_but_for_rounding_gives_zero(value: float) -> None:
    values = torch.full((4, 5), value)
    values[0, 0] = torch.nextafter(values[0, 0], torch.tensor(torch.inf))
    mask = torch.ones(4, 5, dtype=torch.bool)
    assert adv.whiten(values, mask, adv.masked_moments(values, mask)).abs().max() == 0


def test_a_reward_that_is_not_a_number_is_not_taken_for_an_equal_one() -> None:
    rewards, groups = torch.tensor([1.0, math.nan]), torch.tensor([0, 0])
    assert adv.group_advantages(rewards, groups, "grpo").isnan().all()
    values, mask = rewards[None], torch.ones(1, 2, dtype=torch.bool)
    assert adv.whiten(values, mask, adv.masked_moments(values, mask)).isnan().all()
