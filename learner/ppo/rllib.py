"""RLlib's learner around `PPORank`. Knows nothing of the driver."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cluster.trajectory import Trajectory
from learner.config import learner_threads
from learner.distributed.gradients import make_adamw
from learner.distributed.ranks import Ranks
from learner.distributed.rllib_learner import RankLearner, RankModule
from learner.model.actor_critic import ActorCritic
from learner.ppo.explanation import Explanation
from learner.ppo.rank import LearnerSettings, PPORank, RankResult, shard_actor_critic
from learner.ppo.shares import Share
from learner.ppo.weights import Publication


class ActorCriticModule(RankModule):
    """The actor-critic as RLlib's module."""

    def load(self, settings: LearnerSettings) -> ActorCritic:
        """The actor-critic that the settings ask for."""
        return ActorCritic(settings.model)


class TrajectoryLearner(RankLearner):
    """One rank. All methods must be called on every rank alike."""

    module_class = ActorCriticModule
    _settings: LearnerSettings
    _rank: PPORank

    def num_threads(self) -> int:
        """All cores but one, which is left to the engines, shared out among the ranks."""
        return learner_threads(self._settings.config)

    def shard(self, net: ActorCritic, num_ranks: int, device: torch.device) -> None:
        """`shard_actor_critic`."""
        shard_actor_critic(net, self._settings, num_ranks, device)

    def make_optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """The optimiser of policy and critic."""
        return make_adamw(parameters, weight_decay=self._settings.config.weight_decay)

    def make_rank(self, net: ActorCritic, optimizer: torch.optim.Optimizer, ranks: Ranks, device: torch.device) -> Any:
        """The rank with, where the settings say so, the state of a checkpoint."""
        return PPORank(self._settings, net, optimizer, ranks, device)

    def update(self, *, training_data: Any, **_: Any) -> RankResult:
        """Train one step on this rank's share, then publish the next version. Called by RLlib's LearnerGroup."""
        return self._rank.update(training_data.step, training_data.share)

    def explain(self, step: int, share: Share, uid: str) -> Explanation:
        """`PPORank.explain`."""
        return self._rank.explain(step, share, uid)

    def publish(self) -> Publication:
        """`PPORank.publish`."""
        return self._rank.publish()

    def reference_kl(self, trajectories: Sequence[Trajectory]) -> list[float]:
        """`PPORank.reference_kl`."""
        return self._rank.reference_kl(trajectories)

    def save_checkpoint(self, path: Path, extra: Mapping[str, str]) -> None:
        """`PPORank.save_checkpoint`."""
        self._rank.save_checkpoint(path, extra)

    def save_policy(self, path: Path) -> None:
        """`PPORank.save_policy`."""
        self._rank.save_policy(path)
