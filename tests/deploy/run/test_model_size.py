"""Test the number of weights in a model folder, and PPO's learning rate by it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from cluster.errors import InputError
from deploy.config.schema import RunConfig
from deploy.run.model_size import num_parameters, with_learning_rate
from learner.config import LearnerConfig, LoraConfig


def write(path: Path, *shapes: tuple[int, ...]) -> None:
    save_file({f"w{i}": np.zeros(shape, np.float32) for i, shape in enumerate(shapes)}, path)


def test_weights_are_counted_once_beside_other_files(tmp_path: Path) -> None:
    write(tmp_path / "model.safetensors", (3, 4), (5,))
    write(tmp_path / "consolidated.safetensors", (3, 4), (5,))
    assert num_parameters(tmp_path) == 17


def test_shards_are_those_of_the_index(tmp_path: Path) -> None:
    for number in (1, 2):
        write(tmp_path / f"model-{number:05}-of-00002.safetensors", (2, 2))
    write(tmp_path / "model-old.safetensors", (9, 9))
    weight_map = {f"w{i}": f"model-{i:05}-of-00002.safetensors" for i in (1, 2)}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert num_parameters(tmp_path) == 8


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x02\0\0\0\0\0\0\0[]"])
def test_a_file_that_is_no_model_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(InputError, match=r"model\.safetensors"):
        num_parameters(tmp_path)


def test_ppo_takes_the_rate_of_the_models_size_unless_one_is_set(tmp_path: Path) -> None:
    write(tmp_path / "model.safetensors", (1000, 1000))
    assert with_learning_rate(RunConfig(), tmp_path).learner.learning_rate == 3.2e-5
    adapters = RunConfig(learner=LearnerConfig(lora=LoraConfig(rank=4)))
    assert with_learning_rate(adapters, tmp_path).learner.learning_rate == 3.2e-4
    given = RunConfig(learner=LearnerConfig(learning_rate=0.1))
    assert with_learning_rate(given, tmp_path) == given
