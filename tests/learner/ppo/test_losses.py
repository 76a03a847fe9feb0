"""Losses match slow versions close to the papers, on inputs on both sides of every clip."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from learner.model.compiled import entropy
from learner.ppo import losses

CLIP = 0.2
CAP, FLOOR = 2.0, 0.5


def inputs(num: int = 400) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    draw = torch.randn(3, num // 4, 4, dtype=torch.float64, generator=generator) * 0.5
    mask = torch.rand(num // 4, 4, generator=generator) < 0.8
    mask[:, 0] = True
    return {"logprobs": draw[0] - 3, "proximal_logprobs": draw[1] - 3, "advantages": draw[2], "mask": mask}


def behavior() -> Tensor:
    return torch.randn(100, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 0.5 - 3


def rows(*tensors: Tensor) -> Iterator[tuple[list[float], ...]]:
    return zip(*(tensor.tolist() for tensor in tensors), strict=True)


def assert_close(found: Tensor, expected: list[list[float]], mask: Tensor) -> None:
    torch.testing.assert_close(found[mask], torch.tensor(expected, dtype=torch.float64)[mask], atol=1e-12, rtol=0)


def slow_policy_loss(current: float, proximal: float, advantage: float, high: float = CLIP) -> float:
    """Compute minus eq. 7 of arXiv:1707.06347."""
    ratio = math.exp(current) / math.exp(proximal)
    bounded = min(max(ratio, 1 - CLIP), 1 + high)
    return -min(ratio * advantage, bounded * advantage)


def test_the_policy_loss_is_ppos_on_both_sides_of_every_clip() -> None:
    values = inputs()
    terms = losses.policy_loss(**values, clip=CLIP)
    names = ("logprobs", "proximal_logprobs", "advantages")
    expected = [[slow_policy_loss(*token) for token in zip(*row, strict=True)] for row in rows(*map(values.get, names))]
    assert_close(terms.loss, expected, values["mask"])
    for positive in (True, False):
        side = (values["advantages"] > 0) == positive
        for region in (terms.ratio < 1 - CLIP, (terms.ratio - 1).abs() < CLIP, terms.ratio > 1 + CLIP):
            assert (side & region).any()


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("outside", ["truncate", "mask"])
def test_importance_weights_are_truncated_or_masked_outside_their_band(level: Any, outside: Any) -> None:
    proximal, mask = inputs()["proximal_logprobs"], inputs()["mask"]
    found = losses.importance_weights(proximal, behavior(), mask, level=level, cap=CAP, floor=FLOOR, outside=outside)
    expected = []
    for row in rows(proximal, behavior(), mask):
        ratios = [math.exp(p) / math.exp(b) if m else 1.0 for p, b, m in zip(*row, strict=True)]
        weights = ratios if level == "token" else [math.prod(ratios)] * 4
        if outside == "truncate":
            expected.append([min(weight, CAP) for weight in weights])
        else:
            expected.append([weight if FLOOR <= weight <= CAP else 0.0 for weight in weights])
    assert_close(found, expected, mask)
    assert ((found == (CAP if outside == "truncate" else 0)) & mask).any()
    assert ((found > FLOOR) & (found < CAP)).any()


def test_gspo_clips_the_geometric_mean_of_a_responses_ratios() -> None:
    values = inputs()
    terms = losses.policy_loss(**values, clip=CLIP, objective="gspo")
    expected = []
    for current, proximal, advantages, mask in rows(*values.values()):
        gaps = [c - p for c, p, m in zip(current, proximal, mask, strict=True) if m]
        ratio = math.exp(sum(gaps) / len(gaps))
        expected.append([-min(ratio * a, min(max(ratio, 1 - CLIP), 1 + CLIP) * a) for a in advantages])
    assert_close(terms.loss, expected, values["mask"])
    assert 0 < int(terms.is_clipped[values["mask"]].sum()) < int(values["mask"].sum())


def test_gspo_has_the_sequence_ratios_gradient_if_advantages_are_equal() -> None:
    values = inputs()
    advantages, mask = values["advantages"][:, :1].expand(-1, 4), values["mask"]
    found = values["logprobs"].clone().requires_grad_()
    values |= {"logprobs": found, "advantages": advantages}
    losses.policy_loss(**values, clip=9.0, objective="gspo").loss[mask].sum().backward()
    direct = found.detach().clone().requires_grad_()
    count = mask.sum(1)
    ratio = (((direct - values["proximal_logprobs"]) * mask).sum(1) / count).exp()
    (-ratio * advantages[:, 0] * count).sum().backward()
    torch.testing.assert_close(found.grad, direct.grad, atol=1e-12, rtol=0)


def test_cispo_clips_the_weight_but_keeps_every_gradient() -> None:
    values = inputs()
    current = values.pop("logprobs").requires_grad_()
    terms = losses.policy_loss(current, **values, clip=CLIP, objective="cispo")
    terms.loss.sum().backward()
    ratio = (current - values["proximal_logprobs"]).exp().detach()
    expected = -ratio.clamp(1 - CLIP, 1 + CLIP) * values["advantages"]
    torch.testing.assert_close(current.grad, expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(terms.loss, expected * current.detach(), atol=1e-12, rtol=0)
    assert torch.equal(terms.is_clipped, (ratio - 1).abs() > CLIP)
    assert terms.is_clipped.any()


def test_dual_clip_bounds_bad_tokens_and_clip_higher_frees_good_ones() -> None:
    values = inputs()
    terms = losses.policy_loss(**values, clip=CLIP, clip_high=0.4, dual_clip=1.5)
    expected: list[list[float]] = []
    is_bounded: list[bool] = []
    for row in rows(values["logprobs"], values["proximal_logprobs"], values["advantages"], terms.is_clipped):
        expected.append([])
        for current, proximal, advantage, is_clipped in zip(*row, strict=True):
            loss = slow_policy_loss(current, proximal, advantage, high=0.4)
            bounded = advantage < 0 and loss > -1.5 * advantage
            is_bounded.append(bounded)
            assert not bounded or is_clipped
            expected[-1].append(-1.5 * advantage if bounded else loss)
    assert_close(terms.loss, expected, values["mask"])
    assert 0 < sum(is_bounded) < len(is_bounded)
    good = values["advantages"] > 0
    assert not terms.is_clipped[good & (terms.ratio > 1 + CLIP) & (terms.ratio < 1.4)].any()
    assert terms.is_clipped[good & (terms.ratio > 1.4)].all()


def test_clipped_tokens_and_importance_weights_have_no_gradient() -> None:
    values = inputs()
    values["logprobs"].requires_grad_()
    terms = losses.policy_loss(**values, clip=CLIP)
    terms.loss.sum().backward()
    gradient = values["logprobs"].grad
    assert gradient is not None
    assert torch.equal(gradient == 0, terms.is_clipped)
    assert terms.is_clipped.any()
    proximal = values["proximal_logprobs"].requires_grad_()
    assert not losses.importance_weights(proximal, behavior(), values["mask"], cap=CAP).requires_grad


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_the_weight_is_exactly_one_if_the_policies_agree(level: Any) -> None:
    weights = losses.importance_weights(behavior(), behavior(), inputs()["mask"], level=level, cap=CAP)
    assert torch.equal(weights, torch.ones(100, 4, dtype=torch.float64))


@pytest.mark.parametrize("objective", ["ppo", "gspo", "cispo"])
def test_an_extreme_log_ratio_gives_a_finite_loss(objective: Any) -> None:
    far, mask = torch.tensor([[-1e4, 0.0]]), torch.tensor([[True, True]])
    advantages = torch.tensor([[1.0, -1.0]])
    terms = losses.policy_loss(
        far, proximal_logprobs=far.flip(1), advantages=advantages, mask=mask, clip=CLIP, objective=objective
    )
    assert torch.isfinite(terms.loss).all()
    assert torch.isfinite(losses.importance_weights(far.flip(1), far, mask, cap=1e30)).all()


def test_the_value_loss_takes_the_worse_of_clipped_and_free() -> None:
    generator = torch.Generator().manual_seed(1)
    values, old_values, returns = torch.randn(3, 300, dtype=torch.float64, generator=generator) * 0.5
    expected = []
    for v, old, r in zip(values.tolist(), old_values.tolist(), returns.tolist(), strict=True):
        bounded = min(max(v, old - CLIP), old + CLIP)
        expected.append(0.5 * max((v - r) ** 2, (bounded - r) ** 2))
    loss, is_clipped = losses.value_loss(values, old_values=old_values, returns=returns, clip=CLIP)
    assert 0 < int(is_clipped.sum()) < 300
    torch.testing.assert_close(loss, torch.tensor(expected, dtype=torch.float64), atol=1e-12, rtol=0)
    moved = values - old_values
    assert all(region.any() for region in (moved < -CLIP, moved.abs() < CLIP, moved > CLIP))


def test_entropy_is_log_v_if_uniform_and_zero_if_certain() -> None:
    uniform = torch.log_softmax(torch.zeros(1, 8), -1)
    certain = torch.log_softmax(torch.tensor([[100.0, 0.0, 0.0]]), -1)
    torch.testing.assert_close(entropy(uniform), torch.tensor([math.log(8)]))
    torch.testing.assert_close(entropy(certain), torch.tensor([0.0]))


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean_token_sum", "sequence_mean_token_mean"])
def test_aggregates_of_micro_batches_add_up(aggregation: losses.Aggregation) -> None:
    values = torch.tensor([[1.0, math.nan, 4.0], [3.0, 5.0, math.nan], [2.0, math.nan, math.nan]])
    mask = ~values.isnan()
    counts = {"num_tokens": 5, "num_sequences": 3}
    whole = losses.aggregate(values, mask, aggregation, **counts)
    pieces = [losses.aggregate(values[rows], mask[rows], aggregation, **counts) for rows in ([0], [2, 1])]
    expected = {"token_mean": 3.0, "sequence_mean_token_sum": 5.0, "sequence_mean_token_mean": 8.5 / 3}
    assert float(whole) == pytest.approx(expected[aggregation])
    assert float(sum(pieces)) == pytest.approx(expected[aggregation])


def test_token_means_add_up_and_ignore_values_under_the_mask() -> None:
    values = torch.tensor([[1.0, math.nan], [3.0, 5.0]], dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True, False], [True, True]])
    whole = losses.token_mean(values, mask, 3)
    pieces = losses.token_mean(values[0], mask[0], 3) + losses.token_mean(values[1], mask[1], 3)
    assert whole.item() == pieces.item() == 3.0
    whole.backward()
    assert values.grad is not None
    torch.testing.assert_close(values.grad, mask.double() / 3)


@given(st.integers(1, 3), st.integers(1, 4), st.integers(0, 2**32 - 1), st.booleans())
def test_losses_and_gradients_are_finite_for_any_mask_and_ties(
    num_rows: int, width: int, seed: int, with_garbage: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(num_rows, width, generator=generator) < 0.5
    drawn = torch.randn(3, num_rows, width, generator=generator) * 50
    garbage = torch.full_like(drawn, 1e30 if with_garbage else 0.0)
    current, proximal, advantages = torch.where(mask, drawn.round(), garbage)
    current = current.requires_grad_()
    weights = losses.importance_weights(proximal, advantages, mask, cap=CAP, level="sequence")
    for objective in ("ppo", "gspo", "cispo"):
        terms = losses.policy_loss(
            current, proximal_logprobs=proximal, advantages=advantages, mask=mask, clip=CLIP, objective=objective
        )
        for aggregation in ("token_mean", "sequence_mean_token_sum", "sequence_mean_token_mean"):
            loss = losses.aggregate(terms.loss * weights, mask, aggregation, num_tokens=9, num_sequences=3)
            (gradient,) = torch.autograd.grad(loss, current, retain_graph=True)
            assert torch.isfinite(loss)
            assert torch.isfinite(gradient[mask]).all()
            if not mask.any():
                assert loss == 0
