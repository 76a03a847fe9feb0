"""Test the number of weights in a model folder, and PPO's learning rate by it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from deploy.config.schema import RunConfig
from deploy.run.model_size import num_parameters, with_learning_rate
from learner.config import LearnerConfig, LoraConfig


def write(path: Path, *shapes: tuple[int, ...]) -> None:
    save_file({f"w{i}": np.zeros(shape, np.float32) for i, shape in enumerate(shapes)}, path)


def test_all_weights_of_the_model_are_counted(tmp_path: Path) -> None:
    write(tmp_path / "model.safetensors", (3, 4), (5,))
    write(tmp_path / "consolidated.safetensors", (3, 4), (5,))
    assert num_parameters(tmp_path) == 17


def test_ppo_takes_the_rate_of_the_models_size_unless_one_is_set(tmp_path: Path) -> None:
    write(tmp_path / "model.safetensors", (1000, 1000))
    assert with_learning_rate(RunConfig(), tmp_path).learner.learning_rate == 3.2e-5
    adapters = RunConfig(learner=LearnerConfig(lora=LoraConfig(rank=4)))
    assert with_learning_rate(adapters, tmp_path).learner.learning_rate == 3.2e-4
    given = RunConfig(learner=LearnerConfig(learning_rate=0.1))
    assert with_learning_rate(given, tmp_path) == given
