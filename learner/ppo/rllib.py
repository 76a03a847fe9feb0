"""RLlib's learner around `PPORank`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from learner.config import learner_threads
from learner.distributed.gradients import make_adamw
from learner.distributed.ranks import Ranks
from learner.distributed.rllib_learner import RankLearner, RankModule
from learner.model.actor_critic import ActorCritic
from learner.ppo.rank import LearnerSettings, PPORank, RankResult, shard_actor_critic


class ActorCriticModule(RankModule):
    """The actor-critic as RLlib's module."""

    def load(self, settings: LearnerSettings) -> ActorCritic:
        """Load the actor-critic that the settings ask for."""
        return ActorCritic(settings.model())


class TrajectoryLearner(RankLearner):
    """Runs a `PPORank` in RLlib's process."""

    module_class = ActorCriticModule
    _settings: LearnerSettings
    _rank: PPORank

    def num_threads(self) -> int:
        """All cores but one, which is left to the engines, divided among the ranks."""
        return learner_threads(self._settings.config)

    def shard(self, net: ActorCritic, num_ranks: int, device: torch.device) -> None:
        """Shard policy and critic over the ranks."""
        shard_actor_critic(net, self._settings, num_ranks, device)

    def make_optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """Create the optimiser of policy and critic."""
        return make_adamw(parameters, weight_decay=self._settings.config.weight_decay)

    def make_rank(self, net: ActorCritic, optimizer: torch.optim.Optimizer, ranks: Ranks, device: torch.device) -> Any:
        """Create the rank, with the state of the checkpoint if the settings name one."""
        return PPORank(self._settings, net, optimizer, ranks, device)

    def update(self, *, training_data: Any, **_: Any) -> RankResult:
        """Train one step on this rank's share, then publish the next version; called by the group."""
        return self._rank.update(training_data.step, training_data.share)
