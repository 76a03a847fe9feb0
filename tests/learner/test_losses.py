"""Losses against slow versions close to the papers, on inputs that reach both sides of every clip."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from learner import losses

CLIP = 0.2
CAP = 2.0


def inputs(num: int = 400) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    draw = torch.randn(4, num, dtype=torch.float64, generator=generator) * 0.5
    return {
        "logprobs": draw[0] - 3,
        "proximal_logprobs": draw[1] - 3,
        "behavior_logprobs": draw[2] - 3,
        "advantages": draw[3],
    }


def slow_policy_loss(current: float, proximal: float, behavior: float, advantage: float) -> float:
    """Minus eq. 5 of arXiv:2505.24298, with a truncated weight."""
    weight = min(math.exp(proximal) / math.exp(behavior), CAP)
    ratio = math.exp(current) / math.exp(proximal)
    bounded = min(max(ratio, 1 - CLIP), 1 + CLIP)
    return -weight * min(ratio * advantage, bounded * advantage)


def test_the_policy_loss_is_decoupled_ppo_on_both_sides_of_every_clip() -> None:
    given = inputs()
    terms = losses.policy_loss(**given, clip=CLIP, importance_cap=CAP)
    names = ("logprobs", "proximal_logprobs", "behavior_logprobs", "advantages")
    expected = [slow_policy_loss(*row) for row in zip(*(given[name].tolist() for name in names), strict=True)]
    torch.testing.assert_close(terms.loss, torch.tensor(expected, dtype=torch.float64), atol=1e-12, rtol=0)
    for positive in (True, False):
        side = (given["advantages"] > 0) == positive
        for region in (terms.ratio < 1 - CLIP, (terms.ratio - 1).abs() < CLIP, terms.ratio > 1 + CLIP):
            assert (side & region & (terms.importance_weight == CAP)).any()
            assert (side & region & (terms.importance_weight < CAP)).any()


def test_dual_clip_bounds_the_loss_of_bad_tokens_and_clip_higher_frees_good_ones() -> None:
    given = inputs()
    terms = losses.policy_loss(**given, clip=CLIP, importance_cap=CAP, clip_high=0.4, dual_clip=1.5)
    rows = zip(*(given[name].tolist() for name in given), terms.is_clipped.tolist(), strict=True)
    expected, is_bounded = [], []
    for current, proximal, behavior, advantage, is_clipped in rows:
        ratio = math.exp(current - proximal)
        gain = min(ratio * advantage, min(max(ratio, 1 - CLIP), 1.4) * advantage)
        bounded = advantage < 0 and gain < 1.5 * advantage
        is_bounded.append(bounded)
        assert not bounded or is_clipped
        weight = min(math.exp(proximal - behavior), CAP)
        expected.append(-weight * (1.5 * advantage if bounded else gain))
    torch.testing.assert_close(terms.loss, torch.tensor(expected, dtype=torch.float64), atol=1e-12, rtol=0)
    assert 0 < sum(is_bounded) < len(is_bounded)
    good = given["advantages"] > 0
    assert not terms.is_clipped[good & (terms.ratio > 1 + CLIP) & (terms.ratio < 1.4)].any()
    assert terms.is_clipped[good & (terms.ratio > 1.4)].all()


def test_no_gradient_comes_from_clipped_tokens_or_through_the_importance_weight() -> None:
    given = inputs()
    for name in ("logprobs", "proximal_logprobs", "behavior_logprobs"):
        given[name].requires_grad_()
    terms = losses.policy_loss(**given, clip=CLIP, importance_cap=CAP)
    terms.loss.sum().backward()
    gradient = given["logprobs"].grad
    assert gradient is not None
    assert torch.equal(gradient == 0, terms.is_clipped)
    assert terms.is_clipped.any()
    assert given["behavior_logprobs"].grad is None


def test_where_behavior_and_proximal_agree_the_weight_is_exactly_one() -> None:
    given = inputs() | {"behavior_logprobs": inputs()["proximal_logprobs"]}
    terms = losses.policy_loss(**given, clip=CLIP, importance_cap=CAP)
    assert torch.equal(terms.importance_weight, torch.ones(400, dtype=torch.float64))


def test_an_absurd_log_ratio_gives_a_finite_loss() -> None:
    far = torch.tensor([-1e4, 0.0])
    terms = losses.policy_loss(
        far,
        proximal_logprobs=far.flip(0),
        behavior_logprobs=far,
        advantages=torch.tensor([1.0, -1.0]),
        clip=CLIP,
        importance_cap=CAP,
    )
    assert torch.isfinite(terms.loss).all()


def test_the_value_loss_takes_the_worse_of_clipped_and_free() -> None:
    generator = torch.Generator().manual_seed(1)
    values, old_values, returns = torch.randn(3, 300, dtype=torch.float64, generator=generator) * 0.5
    expected = []
    for v, old, r in zip(values.tolist(), old_values.tolist(), returns.tolist(), strict=True):
        bounded = min(max(v, old - CLIP), old + CLIP)
        expected.append(0.5 * max((v - r) ** 2, (bounded - r) ** 2))
    loss = losses.value_loss(values, old_values=old_values, returns=returns, clip=CLIP)
    torch.testing.assert_close(loss, torch.tensor(expected, dtype=torch.float64), atol=1e-12, rtol=0)
    moved = values - old_values
    assert all(region.any() for region in (moved < -CLIP, moved.abs() < CLIP, moved > CLIP))


def test_entropy_is_log_v_for_a_uniform_distribution_and_zero_for_a_certain_one() -> None:
    uniform = torch.log_softmax(torch.zeros(1, 8), -1)
    certain = torch.log_softmax(torch.tensor([[100.0, 0.0, 0.0]]), -1)
    torch.testing.assert_close(losses.entropy(uniform), torch.tensor([math.log(8)]))
    torch.testing.assert_close(losses.entropy(certain), torch.tensor([0.0]))


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean_token_sum", "sequence_mean_token_mean"])
def test_aggregates_of_pieces_add_up_to_that_of_the_whole(aggregation: losses.Aggregation) -> None:
    values = torch.tensor([[1.0, math.nan, 4.0], [3.0, 5.0, math.nan], [2.0, math.nan, math.nan]])
    mask = ~values.isnan()
    counts = {"num_tokens": 5, "num_sequences": 3}
    whole = losses.aggregate(values, mask, aggregation, **counts)
    pieces = [losses.aggregate(values[rows], mask[rows], aggregation, **counts) for rows in ([0], [2, 1])]
    expected = {"token_mean": 3.0, "sequence_mean_token_sum": 5.0, "sequence_mean_token_mean": 8.5 / 3}
    assert float(whole) == pytest.approx(expected[aggregation])
    assert float(sum(pieces)) == pytest.approx(expected[aggregation])


def test_token_means_of_pieces_add_up_to_that_of_the_whole_and_garbage_under_the_mask_is_ignored() -> None:
    values = torch.tensor([[1.0, math.nan], [3.0, 5.0]], dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True, False], [True, True]])
    whole = losses.token_mean(values, mask, 3)
    pieces = losses.token_mean(values[0], mask[0], 3) + losses.token_mean(values[1], mask[1], 3)
    assert whole.item() == pieces.item() == 3.0
    whole.backward()
    assert values.grad is not None
    torch.testing.assert_close(values.grad, mask.double() / 3)
