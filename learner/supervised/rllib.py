"""RLlib's learner around `SupervisedRank`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from learner.config import stage_threads
from learner.distributed.gradients import make_adamw
from learner.distributed.ranks import Ranks
from learner.distributed.rllib_learner import RankLearner, RankModule
from learner.supervised.rank import SupervisedRank, SupervisedSettings, load_net, shard_net


class SupervisedModule(RankModule):
    """The networks of a supervised stage as RLlib's module."""

    def load(self, settings: SupervisedSettings) -> nn.Module:
        """Load the networks that the stage trains."""
        return load_net(settings)


class SupervisedLearner(RankLearner):
    """Runs a `SupervisedRank` in RLlib's process."""

    module_class = SupervisedModule
    _settings: SupervisedSettings
    _rank: SupervisedRank

    def num_threads(self) -> int:
        """All cores, divided among the ranks: no engines run beside them."""
        return stage_threads(self._settings.config)

    def shard(self, net: Any, num_ranks: int, device: torch.device) -> None:
        """Shard the networks over the ranks."""
        shard_net(net, self._settings, num_ranks, device)

    def make_optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """Create the optimiser of the whole model."""
        return make_adamw(parameters)

    def make_rank(self, net: Any, optimizer: torch.optim.Optimizer, ranks: Ranks, device: torch.device) -> Any:
        """Create the rank with its data and the state of the stage's newest checkpoint, if there is one."""
        return SupervisedRank(self._settings, net, optimizer, ranks, device)
