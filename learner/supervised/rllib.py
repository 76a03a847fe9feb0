"""RLlib's learner around `SupervisedRank`. Knows nothing of the driver."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from learner.config import stage_threads
from learner.distributed.gradients import make_adamw
from learner.distributed.ranks import Ranks
from learner.distributed.rllib_learner import RankLearner, RankModule
from learner.supervised.loop import Row
from learner.supervised.rank import SupervisedRank, SupervisedSettings, load_net, shard_net


class SupervisedModule(RankModule):
    """What a supervised stage trains as RLlib's module."""

    def load(self, settings: SupervisedSettings) -> nn.Module:
        """`load_net`."""
        return load_net(settings)


class SupervisedLearner(RankLearner):
    """One rank. All methods must be called on every rank alike."""

    module_class = SupervisedModule
    _settings: SupervisedSettings
    _rank: SupervisedRank

    def num_threads(self) -> int:
        """All cores, shared out among the ranks: nothing works beside them."""
        return stage_threads(self._settings.config)

    def shard(self, net: Any, num_ranks: int, device: torch.device) -> None:
        """`shard_net`."""
        shard_net(net, self._settings, num_ranks, device)

    def make_optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """The optimiser of the whole model."""
        return make_adamw(parameters)

    def make_rank(self, net: Any, optimizer: torch.optim.Optimizer, ranks: Ranks, device: torch.device) -> Any:
        """The rank with its data and, where there is one, the state of the stage's newest checkpoint."""
        return SupervisedRank(self._settings, net, optimizer, ranks, device)

    def counts(self) -> Row:
        """`SupervisedRank.counts`."""
        return self._rank.counts()

    def advance(self, num: int) -> list[Row]:
        """`SupervisedRank.advance`."""
        return self._rank.advance(num)

    def finish(self) -> Row:
        """`SupervisedRank.finish`."""
        return self._rank.finish()
