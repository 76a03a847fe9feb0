"""Test that metrics reach metrics.jsonl and TensorBoard, also if a run resumes."""

from __future__ import annotations

import json
import math
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from deploy.run.metrics_log import MetricsLog


def scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def write(path: Path, steps: range, value: float) -> None:
    log = MetricsLog(path)
    for step in steps:
        log.write({"stage": "ppo", "step": step, "learner/reward_mean": value})
    log.close()


def test_each_step_is_a_line_and_a_point(tmp_path: Path) -> None:
    write(tmp_path, range(1, 4), 0.5)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows[2] == {"stage": "ppo", "step": 3, "learner/reward_mean": 0.5}
    assert scalars(tmp_path / "tensorboard" / "ppo", "learner/reward_mean") == [(1, 0.5), (2, 0.5), (3, 0.5)]


def test_tensorboard_drops_repeated_steps_if_a_run_resumes(tmp_path: Path) -> None:
    write(tmp_path, range(1, 4), 0.5)
    write(tmp_path, range(2, 4), 0.75)
    assert scalars(tmp_path / "tensorboard" / "ppo", "learner/reward_mean") == [(1, 0.5), (2, 0.75), (3, 0.75)]


def test_a_non_finite_number_is_written_as_null(tmp_path: Path) -> None:
    write(tmp_path, range(1, 2), math.nan)
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["learner/reward_mean"] is None
