"""The learner's settings."""

from __future__ import annotations

import pytest

from learner import config
from learner.config import LearnerConfig, learner_threads


def test_learners_divide_all_cores_but_one_unless_threads_are_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "num_cores", lambda: 8)
    assert learner_threads(LearnerConfig(num_threads=5)) == 5
    assert learner_threads(LearnerConfig()) == 7
    assert learner_threads(LearnerConfig(num_learners=2)) == 3
    monkeypatch.setattr(config, "num_cores", lambda: 1)
    assert learner_threads(LearnerConfig()) == 1
