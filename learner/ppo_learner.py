"""RLlib's learner around `PPORank`: RLlib says where ranks run and how they find each other.

Replaces RLlib's own update, gradient averaging and checkpoints. Knows nothing of the driver.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from ray.rllib.algorithms.ppo.torch.ppo_torch_learner import PPOTorchLearner
from ray.rllib.core.rl_module.apis.value_function_api import ValueFunctionAPI
from ray.rllib.core.rl_module.torch.torch_rl_module import TorchRLModule

from cluster.remote import redirect_output
from cluster.trajectory import Trajectory
from learner.actor_critic import ActorCritic
from learner.config import learner_threads
from learner.ppo_rank import LearnerSettings, PPORank, RankResult, make_optimizer, shard_actor_critic
from learner.ranks import Ranks
from learner.weight_publisher import Publication


class ActorCriticModule(TorchRLModule, ValueFunctionAPI):
    """The actor-critic as RLlib's module; `model_config["settings"]` are the LearnerSettings."""

    def setup(self) -> None:
        """Load the model; called by RLlib while it builds the learner."""
        self.actor_critic = ActorCritic(self.model_config["settings"].model)

    def compute_values(self, batch: dict[str, Any], embeddings: Any = None) -> torch.Tensor:
        """Values [B, T] of `token_ids`, `mask` and `lengths`, which RLlib asks of every PPO module."""
        values: torch.Tensor = self.actor_critic(batch["token_ids"], batch["mask"], batch["lengths"]).values
        return values


class TrajectoryLearner(PPOTorchLearner):
    """One rank. All methods must be called on every rank alike."""

    def build(self) -> None:
        """Load the models and, where the settings say so, the state of a checkpoint."""
        self._settings: LearnerSettings = self.config.learner_config_dict["settings"]
        if self._settings.log_dir is not None and self.config.num_learners > 0:
            redirect_output(self._settings.log_dir / f"learner-{self._learner_index}.log")
        torch.set_num_threads(learner_threads(self._settings.config))
        super().build()
        (optimizer,) = self._named_optimizers.values()
        (module_id,) = self.module.keys()
        device = torch.device(self._device)
        ranks = Ranks(device, distributed=self.distributed)
        self._rank = PPORank(self._settings, self.module[module_id].actor_critic, optimizer, ranks, device)

    def _make_module(self) -> Any:
        """RLlib's module, cut up among the ranks where the settings say so; called by RLlib before the optimiser."""
        module = super()._make_module()
        if self._settings.config.data_parallel == "fsdp2":
            num_ranks, device = torch.distributed.get_world_size(), torch.device(self._device)
            for module_id in module.keys():  # noqa: SIM118
                shard_actor_critic(module[module_id].actor_critic, self._settings, num_ranks, device)
        return module

    def configure_optimizers_for_module(self, module_id: str, config: Any = None) -> None:
        """The optimiser of policy and critic, its learning rate the step's affair; called by RLlib."""
        parameters = list(self.module[module_id].parameters())
        optimizer = make_optimizer(self._settings.config, parameters)
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        self.register_optimizer(module_id=module_id, optimizer=optimizer, params=trained)

    def _make_modules_ddp_if_necessary(self) -> None:
        """Nothing: gradients are summed once they are complete and known to be finite on every rank.

        A wrapper that sums during the backward pass would leave the others waiting for a rank that found an error.
        """

    def update(self, *, training_data: Any, **_: Any) -> RankResult:
        """Train one step on this rank's share, then publish the next version. Called by RLlib's LearnerGroup."""
        return self._rank.update(training_data.step, training_data.share)

    def process_id(self) -> int:
        """The rank's process, for whoever watches it."""
        return os.getpid()

    def ping(self) -> None:
        """Nothing: answers once all calls before it have ended."""

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
