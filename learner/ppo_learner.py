"""RLlib's learner around `PPOStep`: one rank of the group, which is told a step and answers with figures and weights.

Replaces RLlib's own update, gradient averaging and checkpoints; what it keeps of RLlib is where ranks run and how they
find each other. Knows nothing of the driver.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from ray.rllib.algorithms.ppo.torch.ppo_torch_learner import PPOTorchLearner
from ray.rllib.core.rl_module.apis.value_function_api import ValueFunctionAPI
from ray.rllib.core.rl_module.torch.torch_rl_module import TorchRLModule

from cluster.errors import InputError
from cluster.remote import redirect_output
from cluster.trajectory import Trajectory
from learner import checkpoint
from learner.actor_critic import ActorCritic, ModelSettings, load_causal_model, sampled_token_logprobs
from learner.batching import make_batch, micro_batches
from learner.config import LearnerConfig, learner_threads
from learner.ppo_step import MAX_MICRO_BATCH_TOKENS, PPOStep
from learner.ranks import Ranks
from learner.weight_publisher import Publication, WeightPublisher, default_probe

OPTIMIZER_PREFIX = "optimizer."
KL_COEFFICIENT = "kl_coefficient"


@dataclass(frozen=True, slots=True)
class LearnerSettings:
    """All that a rank is built from. `version` is that of the weights: `model`'s, or the checkpoint's where one is."""

    config: LearnerConfig
    model: ModelSettings
    reference_path: Path
    seed: int
    version: int = 0
    checkpoint_path: Path | None = None
    probe_token_ids: tuple[tuple[int, ...], ...] | None = None
    log_dir: Path | None = None
    max_micro_batch_tokens: int = MAX_MICRO_BATCH_TOKENS

    def loaded_model(self) -> ModelSettings:
        """The model to load: the checkpoint's policy takes the place of the first one."""
        if self.checkpoint_path is None:
            return self.model
        return replace(self.model, path=self.checkpoint_path / checkpoint.POLICY)


@dataclass(frozen=True, slots=True)
class RankResult:
    """What a rank answers to a step; only the first rank's publication has tensors."""

    metrics: dict[str, float]
    publication: Publication


class ActorCriticModule(TorchRLModule, ValueFunctionAPI):
    """The actor-critic as RLlib's module; `model_config["settings"]` are the LearnerSettings."""

    def setup(self) -> None:
        """Load the model; called by RLlib while it builds the learner."""
        self.actor_critic = ActorCritic(self.model_config["settings"].loaded_model())

    def compute_values(self, batch: dict[str, Any], embeddings: Any = None) -> torch.Tensor:
        """Values [B, T] of `token_ids` and `mask`, which RLlib asks of every PPO module."""
        values: torch.Tensor = self.actor_critic(batch["token_ids"], batch["mask"]).values
        return values


class TrajectoryLearner(PPOTorchLearner):
    """One rank. All methods but `reference_kl` and `publish` must be called on every rank alike."""

    def build(self) -> None:
        """Load the models and, where the settings say so, the state of a checkpoint."""
        self._settings: LearnerSettings = self.config.learner_config_dict["settings"]
        if self._settings.log_dir is not None and self.config.num_learners > 0:
            redirect_output(self._settings.log_dir / f"learner-{self._learner_index}.log")
        torch.set_num_threads(learner_threads(self._settings.config))
        super().build()
        settings, device = self._settings, torch.device(self._device)
        self._version = settings.version
        self._ranks = Ranks(device, distributed=self.distributed)
        self._reference = load_causal_model(settings.reference_path, settings.model.dtype).to(device)
        self._reference.requires_grad_(False)
        (optimizer,) = self._named_optimizers.values()
        self._optimizer = optimizer
        self._step = PPOStep(
            settings.config,
            self._actor_critic,
            self._reference,
            optimizer,
            self._ranks,
            device=device,
            seed=settings.seed,
            max_micro_batch_tokens=settings.max_micro_batch_tokens,
        )
        if settings.checkpoint_path is not None:
            self._restore(settings.checkpoint_path, optimizer)
        policy = self._actor_critic.policy
        probe = settings.probe_token_ids or default_probe(policy.config, settings.seed)
        self._publisher = WeightPublisher(policy, probe, device)

    @property
    def _actor_critic(self) -> ActorCritic:
        (module,) = (self.module[module_id] for module_id in self.module.keys())  # noqa: SIM118
        actor_critic: ActorCritic = module.actor_critic
        return actor_critic

    def configure_optimizers_for_module(self, module_id: str, config: Any = None) -> None:
        """One AdamW for policy and critic, its learning rate constant; called by RLlib."""
        learner = self._settings.config
        parameters = [parameter for parameter in self.module[module_id].parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(
            parameters, lr=learner.learning_rate, weight_decay=learner.weight_decay, fused=True
        )
        self.register_optimizer(module_id=module_id, optimizer=optimizer, params=parameters)

    def _make_modules_ddp_if_necessary(self) -> None:
        """Nothing: gradients are summed once they are complete and known to be finite on every rank.

        A wrapper that sums during the backward pass would leave the others waiting for a rank that found an error.
        """

    def update(self, *, training_data: Any, **_: Any) -> RankResult:
        """Train one step on this rank's share, then publish the next version. Called by RLlib's LearnerGroup."""
        started = time.monotonic()
        metrics = self._step.run(training_data.step, training_data.share)
        self._version = training_data.step
        publication = self.publish()
        return RankResult({**metrics, "learner/step_s": time.monotonic() - started}, publication)

    def process_id(self) -> int:
        """The rank's process, for whoever watches it."""
        return os.getpid()

    def ping(self) -> None:
        """Nothing: answers once all calls before it have ended."""

    def publish(self) -> Publication:
        """The present version."""
        return self._publisher.publish(self._version, with_tensors=self._ranks.rank == 0)

    def reference_kl(self, trajectories: Sequence[Trajectory]) -> list[float]:
        """k1 from the behaviour policy to the reference, summed over each response, in nats."""
        if not trajectories:
            return []
        batch = make_batch(trajectories, device=self._device)
        sums = [0.0] * len(trajectories)
        for rows in micro_batches(batch.lengths, self._settings.max_micro_batch_tokens):
            token_ids, mask = batch.token_ids[rows], batch.mask[rows]
            reference = sampled_token_logprobs(self._reference, token_ids, mask, self._settings.model.temperature)
            for row, kl in zip(rows, (batch.behavior_logprobs[rows] - reference).sum(1).tolist(), strict=True):
                sums[row] = kl
        return sums

    def save_checkpoint(self, path: Path, extra: Mapping[str, str]) -> None:
        """Write all state, on the first rank: the others hold the same."""
        if self._ranks.rank == 0:
            actor_critic = self._actor_critic
            optimizer = checkpoint.optimizer_tensors(self._optimizer, actor_critic)
            checkpoint.save_checkpoint(
                path,
                version=self._version,
                model=actor_critic.policy,
                source=self._settings.model.path,
                tensors={
                    **actor_critic.critic_tensors(),
                    **optimizer,
                    KL_COEFFICIENT: torch.tensor(self._step.kl_coefficient, dtype=torch.float64),
                },
                extra=extra,
            )

    def save_policy(self, path: Path) -> None:
        """Write the policy as a Hugging Face folder, on the first rank."""
        if self._ranks.rank == 0:
            checkpoint.save_policy(path, self._actor_critic.policy, self._settings.model.path)

    def _restore(self, path: Path, optimizer: torch.optim.Optimizer) -> None:
        version, tensors = checkpoint.load_checkpoint(path)
        if version != self._version:
            raise InputError(
                str(path), f"holds version {version}, but step {self._version + 1} starts from {self._version}"
            )
        self._step.kl_coefficient = float(tensors.pop(KL_COEFFICIENT))
        of_optimizer = {name: tensor for name, tensor in tensors.items() if name.startswith(OPTIMIZER_PREFIX)}
        self._actor_critic.load_critic_tensors({n: t for n, t in tensors.items() if n not in of_optimizer})
        checkpoint.load_optimizer_tensors(optimizer, self._actor_critic, of_optimizer)
