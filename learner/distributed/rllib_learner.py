"""RLlib's learner around a rank: RLlib says where ranks run, how they find each other and what device they have.

Replaces RLlib's own update, gradient averaging and checkpoints. Knows neither what is learnt nor the driver.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import torch
from ray.rllib.algorithms.ppo.torch.ppo_torch_learner import PPOTorchLearner
from ray.rllib.core.rl_module.torch.torch_rl_module import TorchRLModule
from torch import nn

from cluster.actors.remote import redirect_output
from learner.config import LearnerConfig
from learner.distributed.ranks import Ranks


class RankSettings(Protocol):
    """What is needed of a rank's settings here."""

    @property
    def config(self) -> LearnerConfig: ...
    @property
    def log_dir(self) -> Path | None: ...


class RankModule(TorchRLModule):
    """The rank's networks as RLlib's module; `model_config["settings"]` are the rank's settings."""

    net: Any

    def setup(self) -> None:
        """Load the networks; called by RLlib while it builds the learner."""
        self.net = self.load(self.model_config["settings"])

    def load(self, settings: Any) -> nn.Module:
        """The networks that the settings ask for."""
        raise NotImplementedError


class RankLearner(PPOTorchLearner):
    """One rank. All methods must be called on every rank alike."""

    module_class: type[RankModule]

    def build(self) -> None:
        """Load the networks and make the rank of them."""
        self._settings = self.config.learner_config_dict["settings"]
        if self._settings.log_dir is not None and self.config.num_learners > 0:
            redirect_output(self._settings.log_dir / f"learner-{self._learner_index}.log")
        torch.set_num_threads(self.num_threads())
        super().build()
        (optimizer,) = self._named_optimizers.values()
        (module_id,) = self.module.keys()
        device = torch.device(self._device)
        ranks = Ranks(device, distributed=self.distributed)
        self._rank = self.make_rank(self.module[module_id].net, optimizer, ranks, device)

    def num_threads(self) -> int:
        """Threads of torch in this process."""
        raise NotImplementedError

    def shard(self, net: Any, num_ranks: int, device: torch.device) -> None:
        """Cut the networks up among the ranks."""
        raise NotImplementedError

    def make_optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """The optimiser of all that is trained."""
        raise NotImplementedError

    def make_rank(self, net: Any, optimizer: torch.optim.Optimizer, ranks: Ranks, device: torch.device) -> Any:
        """The rank itself, which knows nothing of RLlib."""
        raise NotImplementedError

    @classmethod
    def rl_module_required_apis(cls) -> list[type]:
        """None: nothing of RLlib calls the module."""
        return []

    def _make_module(self) -> Any:
        """RLlib's module, cut up among the ranks where the settings say so; called by RLlib before the optimiser."""
        module = super()._make_module()
        if self._settings.config.data_parallel == "fsdp2":
            num_ranks, device = torch.distributed.get_world_size(), torch.device(self._device)
            for module_id in module.keys():  # noqa: SIM118
                self.shard(module[module_id].net, num_ranks, device)
        return module

    def configure_optimizers_for_module(self, module_id: str, config: Any = None) -> None:
        """The optimiser, its learning rate the step's affair; called by RLlib."""
        parameters = list(self.module[module_id].parameters())
        optimizer = self.make_optimizer(parameters)
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        self.register_optimizer(module_id=module_id, optimizer=optimizer, params=trained)

    def _make_modules_ddp_if_necessary(self) -> None:
        """Nothing: gradients are summed once they are complete.

        A wrapper that sums during the backward pass would leave the others waiting for a rank that found an error.
        """

    def process_id(self) -> int:
        """The rank's process, for whoever watches it."""
        return os.getpid()
