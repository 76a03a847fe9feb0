"""RLlib's learner around a rank: RLlib places the ranks, connects them and assigns their devices.

Replaces RLlib's own update, gradient averaging and checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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
    """The settings of a rank that every kind of learner has."""

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
        """Load the networks that the settings ask for."""
        raise NotImplementedError


class RankLearner(PPOTorchLearner):
    """Runs one rank in RLlib's process. Every call is collective: call it on every rank."""

    module_class: type[RankModule]

    def build(self) -> None:
        """Load the networks and create the rank; called by RLlib."""
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
        """Number of torch threads in this process."""
        raise NotImplementedError

    def shard(self, net: Any, num_ranks: int, device: torch.device) -> None:
        """Shard the networks over the ranks."""
        raise NotImplementedError

    def make_optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """Create the optimiser of all trained parameters."""
        raise NotImplementedError

    def make_rank(self, net: Any, optimizer: torch.optim.Optimizer, ranks: Ranks, device: torch.device) -> Any:
        """Create the rank, which does not depend on RLlib."""
        raise NotImplementedError

    @classmethod
    def rl_module_required_apis(cls) -> list[type]:
        """Return no APIs: RLlib never calls the module."""
        return []

    def _make_module(self) -> Any:
        """Create RLlib's module, sharded if the settings ask for it; called by RLlib before the optimiser."""
        module = super()._make_module()
        if self._settings.config.data_parallel == "fsdp2":
            num_ranks, device = torch.distributed.get_world_size(), torch.device(self._device)
            for module_id in module.keys():  # noqa: SIM118
                self.shard(module[module_id].net, num_ranks, device)
        return module

    def configure_optimizers_for_module(self, module_id: str, config: Any = None) -> None:
        """Create the optimiser; called by RLlib. Each step sets its learning rate."""
        parameters = list(self.module[module_id].parameters())
        optimizer = self.make_optimizer(parameters)
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        self.register_optimizer(module_id=module_id, optimizer=optimizer, params=trained)

    def _make_modules_ddp_if_necessary(self) -> None:
        """No-op: gradients are summed after the backward pass.

        A wrapper that sums during the backward pass would let the others wait indefinitely for a rank that found an
        error.
        """

    def call_rank(self, name: str, arguments: Sequence[Any]) -> Any:
        """Call the method `name` of the rank."""
        return getattr(self._rank, name)(*arguments)
