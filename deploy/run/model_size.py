"""Sets the default learning rate of PPO by the size of the policy."""

from __future__ import annotations

import math
from pathlib import Path

from cluster.model_folder import tensor_shapes
from deploy.config.schema import RunConfig
from learner.learning_rates import default_learning_rate


def with_learning_rate(config: RunConfig, policy: Path) -> RunConfig:
    """Return the settings with the learning rate that PPO trains this policy with, if they leave it open."""
    learner = config.learner
    if learner.learning_rate is not None:
        return config
    rate = default_learning_rate("ppo", num_parameters(policy), lora=learner.lora.rank > 0)
    return config.model_copy(update={"learner": learner.model_copy(update={"learning_rate": rate})})


def num_parameters(folder: Path) -> int:
    """Return the number of weights in a model folder, from the headers of its files."""
    return sum(math.prod(shape) for shape in tensor_shapes(folder).values())
