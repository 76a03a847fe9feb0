"""Test the default learning rates by the model's size, and the schedules over the steps."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from learner.learning_rates import Schedule, default_learning_rate

SHAPES = ("constant", "linear", "cosine")


@pytest.mark.parametrize(
    ("stage", "num_parameters", "rate"),
    [
        ("sft", 10**9, 2e-5),
        ("sft", 7 * 10**9, 7.6e-6),
        ("sft", 10**5, 2e-3),
        ("reward_model", 10**9, 1e-5),
        ("ppo", 494_032_768, 1.4e-6),
        ("ppo", 10**6, 3.2e-5),
        ("sft", 100, 5e-3),
    ],
)
def test_the_default_falls_with_the_root_of_the_models_size(stage: str, num_parameters: int, rate: float) -> None:
    assert default_learning_rate(stage, num_parameters) == rate
    assert default_learning_rate(stage, num_parameters, lora=True) == pytest.approx(min(10 * rate, 5e-3), rel=0.05)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_schedule_rises_to_its_peak_and_falls_to_its_end(shape: Any) -> None:
    schedule = Schedule(shape, warmup_share=0.1, final_share=0.2)
    factors = [schedule.factor(step, 100) for step in range(1, 102)]
    assert factors[:11] == pytest.approx([0.1 * step for step in range(1, 11)] + [1.0])
    middle, end = {"constant": (1.0, 1.0), "linear": (0.6, 0.2), "cosine": (0.6, 0.2)}[shape]
    assert (factors[55], factors[100]) == pytest.approx((middle, end))
    assert schedule.factor(1000, 100) == factors[100], "a longer run stays at the end"


def test_the_first_step_of_a_linear_schedule_has_the_peak_without_warm_up() -> None:
    assert [Schedule("linear").factor(step, 4) for step in (1, 2, 4, 5)] == [1.0, 0.75, 0.25, 0.0]


@given(
    shape=st.sampled_from(SHAPES),
    warmup=st.floats(0, 0.99),
    final=st.floats(0, 1),
    num_steps=st.integers(1, 500),
    data=st.data(),
)
def test_every_factor_lies_between_zero_and_the_peak(
    shape: Any, warmup: float, final: float, num_steps: int, data: st.DataObject
) -> None:
    step = data.draw(st.integers(1, num_steps))
    factor = Schedule(shape, warmup, final).factor(step, num_steps)
    assert 0 < factor <= 1 or (step > 1 and factor == 0)
