"""Schedules over the steps, with the planned number of steps in force at each."""

from __future__ import annotations

import pytest

from learner.config import LearnerConfig
from learner.ppo.schedule import Phase, length_at, phase_at, scheduled


def test_a_linear_schedule_reaches_zero_after_the_last_step() -> None:
    assert [scheduled(0.4, "linear", step, 4) for step in (1, 2, 4, 5)] == pytest.approx([0.4, 0.3, 0.1, 0.0])
    assert {scheduled(0.4, "constant", step, 4) for step in (1, 2, 4, 5)} == {0.4}


def test_a_step_uses_the_planned_length_in_force_at_that_time() -> None:
    lengths = [(0, 4), (4, 8), (6, 20)]
    assert [length_at(step, lengths, 99) for step in (1, 4, 5, 6, 7, 30)] == [4, 4, 8, 8, 20, 20]
    assert [length_at(step, [(6, 20)], 99) for step in (1, 6, 7)] == [99, 99, 20]


def test_the_settings_of_a_step_are_those_in_force_before_it() -> None:
    old, new = Phase(0, LearnerConfig(), 1.0), Phase(4, LearnerConfig(clip=0.1), 1.0)
    assert [phase_at(step, [new, old]) for step in (1, 4, 5, 9)] == [old, old, new, new]
    assert phase_at(4, [new]) is None
