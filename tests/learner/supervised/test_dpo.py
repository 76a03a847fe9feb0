"""Losses of direct preference optimisation match TRL's and slow versions of the papers' equations."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from learner.distributed.ranks import Ranks
from learner.dpo_config import DpoConfig
from learner.model.actor_critic import Outputs
from learner.supervised.choices import Choice, Rated, mismatch
from learner.supervised.direct import ipo_loss, kto_loss, sigmoid_loss
from learner.supervised.dpo import DirectLoss, dpo_plan
from learner.supervised.examples import Completion
from learner.supervised.sft import summed_logprobs

CPU = torch.device("cpu")
VECTORS: dict[str, Any] = json.loads((Path(__file__).parent / "trl_vectors.json").read_text())
LOSS = re.compile(r"(?P<loss>\w+) beta=(?P<beta>\S+)( undesirable_weight=(?P<weight>\S+))?")


class Table(nn.Module):
    """Stands for the policy as in `benchmarks/peer/trl_preferences.py`: logits follow from a table."""

    def __init__(self, table: Any) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.tensor(table, dtype=torch.float64))

    def forward(self, token_ids: Tensor, mask: Tensor, lengths: Sequence[int], *, logprobs_only: bool) -> Outputs:
        seen = nn.functional.one_hot(token_ids, len(self.table)).double().cumsum(1)
        counts = torch.arange(1, token_ids.shape[1] + 1, dtype=torch.float64)[None, :, None]
        logits = self.table[token_ids] + (seen / counts) @ self.table
        logprobs = logits.log_softmax(-1)[:, :-1].gather(-1, token_ids[:, 1:, None])[..., 0]
        spread = torch.nn.functional.pad(logprobs, (1, 0)) * mask
        return Outputs(spread, torch.zeros_like(spread), torch.zeros_like(spread))


POLICY, REFERENCE = (Table(VECTORS["tables"][name]) for name in ("policy", "reference"))


def completion(row: dict[str, Any], key: str) -> Completion:
    return Completion([*row["prompt_ids"], *row[key]], len(row["prompt_ids"]))


def referenced(row: Any) -> Any:
    """Return the row with the reference's log-probabilities."""
    with torch.no_grad():
        logprobs = summed_logprobs(REFERENCE, row.completions, CPU)  # type: ignore[arg-type]
    return row._replace(reference=tuple(logprobs.tolist()))


def pairs() -> list[Any]:
    rows = VECTORS["pairs"]
    return [referenced(Choice(completion(row, "chosen_ids"), completion(row, "rejected_ids"))) for row in rows]


def rated() -> list[Any]:
    completions = [completion(row, "completion_ids") for row in VECTORS["rows"]]
    rows = [Rated(each, row["label"], each) for each, row in zip(completions, VECTORS["rows"], strict=True)]
    return [referenced(row) for row in mismatch(rows, math.inf)[0]]


def loss_of(config: DpoConfig) -> DirectLoss:
    return DirectLoss(POLICY, Ranks(CPU, distributed=False), CPU, config)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", VECTORS["outputs"])
@pytest.mark.parametrize("sizes", [(5,), (2, 3), (1, 1, 1, 1, 1), (4, 0, 1)], ids=str)
def test_loss_gradient_and_metrics_match_trl_for_any_micro_batches(name: str, sizes: tuple[int, ...]) -> None:
    found = LOSS.fullmatch(name)
    assert found is not None
    weight = {"undesirable_weight": float(found["weight"])} if found["weight"] else {}
    config = DpoConfig(loss=found["loss"], beta=float(found["beta"]), **weight)  # type: ignore[arg-type]
    rows = rated() if config.loss == "kto" else pairs()
    left = iter(rows)
    POLICY.zero_grad()
    row = loss_of(config).accumulate([[next(left) for _ in range(size)] for size in sizes], rows)
    expected = VECTORS["outputs"][name]
    renamed = {"rewards/accuracies": "accuracy", "kl": "kl_nats"}
    wanted = {renamed.get(key, key): value for key, value in expected.items() if key != "gradient"}
    accuracy = wanted.pop("accuracy", row["accuracy"])  # TRL computes it in float32
    assert row["accuracy"] == pytest.approx(accuracy, abs=1e-6)
    assert {key: row[key] for key in wanted} == pytest.approx(wanted, abs=1e-9)
    gradient = torch.tensor(expected["gradient"], dtype=torch.float64)
    torch.testing.assert_close(POLICY.table.grad, gradient, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("name", ["sigmoid", "ipo", "kto"])
def test_held_out_rows_are_measured_without_gradient(name: Any) -> None:
    config = DpoConfig(loss=name)
    rows = rated() if name == "kto" else pairs()
    POLICY.zero_grad()
    measured = loss_of(config).measure([rows[:2], rows[2:]], rows)
    assert POLICY.table.grad is None
    row = loss_of(config).accumulate([rows], rows)
    assert measured == pytest.approx(
        {
            "held_out_loss": row["loss"],
            "held_out_accuracy": row["accuracy"],
            "held_out_margin": row["rewards/margins"],
        }
    )


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize("beta", [0.05, 1.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_sigmoid_loss_is_equation_7_of_dpo_with_smoothed_labels(beta: float, smoothing: float) -> None:
    chosen, rejected = [3.0, -1.5, 0.0, -40.0], [-2.0, 2.5, 0.0, 60.0]
    expected = []
    for better, worse in zip(chosen, rejected, strict=True):
        margin = beta * better - beta * worse
        if margin > -700:
            right, wrong = sigmoid(margin), sigmoid(-margin)
            expected.append(-(1 - smoothing) * math.log(right) - smoothing * math.log(wrong))
    loss = sigmoid_loss(*map(torch.tensor, (chosen, rejected)), beta=beta, label_smoothing=smoothing)
    assert loss.tolist() == pytest.approx(expected, rel=1e-5)


def test_the_sigmoid_loss_is_finite_for_extreme_ratios() -> None:
    far = torch.tensor([1e4], requires_grad=True)
    for sign in (1, -1):
        loss = sigmoid_loss(sign * far, -sign * far, beta=1.0).sum()
        (gradient,) = torch.autograd.grad(loss, far)
        assert torch.isfinite(loss)
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_the_ipo_loss_is_equation_17_and_is_0_at_its_optimum(beta: float) -> None:
    chosen, rejected = torch.tensor([0.7, -0.2]), torch.tensor([-0.1, 0.4])
    expected = [(h - 1 / (2 * beta)) ** 2 for h in (0.8, -0.6)]
    assert ipo_loss(chosen, rejected, beta=beta).tolist() == pytest.approx(expected, rel=1e-5)
    optimum = torch.tensor([1 / (2 * beta)])
    assert ipo_loss(optimum, torch.zeros(1), beta=beta).item() == pytest.approx(0, abs=1e-10)


def test_the_kto_loss_is_equation_8_on_both_sides_of_its_reference_point() -> None:
    ratios, labels, kl, beta = [2.0, -1.0, 3.0, -2.0], [True, True, False, False], 0.5, 0.3
    weights = {True: 1.5, False: 0.7}
    values = [
        sigmoid(beta * (r - kl)) if good else sigmoid(beta * (kl - r)) for r, good in zip(ratios, labels, strict=True)
    ]
    expected = [weights[good] * (1 - value) for value, good in zip(values, labels, strict=True)]
    loss = kto_loss(
        torch.tensor(ratios),
        torch.tensor(labels),
        kl,
        beta=beta,
        desirable_weight=weights[True],
        undesirable_weight=weights[False],
    )
    assert loss.tolist() == pytest.approx(expected, rel=1e-5)


def test_a_negative_estimate_of_the_kl_counts_as_0() -> None:
    rows = [row._replace(reference=(row.reference[0], row.reference[1] + 10)) for row in rated()]
    assert loss_of(DpoConfig(loss="kto")).accumulate([rows], rows)["kl_nats"] == 0.0


def test_metrics_of_a_label_that_a_batch_lacks_are_left_out() -> None:
    rows = [row for row in rated() if row.is_desirable]
    row = loss_of(DpoConfig(loss="kto")).accumulate([rows], rows)
    assert "rewards/chosen" in row
    assert not {"rewards/rejected", "rewards/margins", "logps/rejected"} & row.keys()


def test_the_plan_counts_passes_or_steps() -> None:
    plan = dpo_plan(DpoConfig(num_epochs=2, batch_size=4), 10, 1e-3)
    assert (plan.num_steps, plan.evaluate_every_steps, plan.keeps_best, plan.unit) == (6, 3, False, "pairs")
    plan = dpo_plan(DpoConfig(num_steps=5, batch_size=4, evaluate_every_steps=2, patience=1, loss="kto"), 10, 1e-3)
    assert (plan.num_steps, plan.evaluate_every_steps, plan.keeps_best, plan.unit) == (5, 2, True, "responses")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "ipo", "label_smoothing": 0.1}, 'label_smoothing: has no effect with loss = "ipo"'),
        ({"undesirable_weight": 1.3}, 'undesirable_weight: has no effect with loss = "sigmoid"'),
        ({"patience": 2, "held_out_share": 0.0}, "patience: needs a held_out_share above 0"),
    ],
)
def test_settings_without_effect_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DpoConfig(**settings)
