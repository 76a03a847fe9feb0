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
from learner.actor_critic import ActorCritic, ModelSettings, Reference
from learner.batching import make_batch
from learner.config import LearnerConfig, critic_of, learner_threads
from learner.ppo_step import PPOStep
from learner.ranks import Ranks
from learner.sharding import shard
from learner.weight_publisher import Publication, WeightPublisher, default_probe, policy_tensors


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


def model_settings(
    config: LearnerConfig, path: Path, dtype: str, temperature: float, *, seed: int, critic_path: Path | None = None
) -> ModelSettings:
    """The networks that these settings ask for. Raises InputError where they want a reward model and there is none."""
    if config.critic_from == "reward_model" and critic_path is None:
        raise InputError("learner.critic_from", "there is no reward model to start the critic from")
    return ModelSettings(
        path,
        dtype,
        critic_of(config),
        temperature,
        packing=config.packing,
        logprob_chunk_tokens=config.logprob_chunk_tokens,
        activation_checkpointing=config.activation_checkpointing,
        with_entropy_gradient=config.entropy_coefficient > 0,
        critic_path=critic_path if config.critic_from == "reward_model" else None,
        lora=config.lora,
        seed=seed,
    )


@dataclass(frozen=True, slots=True)
class RankResult:
    """What a rank answers to a step; only the first rank's publication has tensors."""

    metrics: dict[str, float]
    publication: Publication


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
        settings, device = self._settings, torch.device(self._device)
        self._version = settings.version
        self._ranks = Ranks(device, distributed=self.distributed)
        (self._optimizer,) = self._named_optimizers.values()
        self._step = PPOStep(
            settings.config,
            self._actor_critic,
            self._load_reference(device),
            self._optimizer,
            self._ranks,
            device=device,
            seed=settings.seed,
        )
        if settings.checkpoint_path is not None:
            self._restore(settings.checkpoint_path)
        probe = settings.probe_token_ids or default_probe(self._actor_critic.policy.config, settings.seed)
        self._publisher = WeightPublisher(self._actor_critic, probe, device, settings.model.dtype)

    @property
    def _actor_critic(self) -> ActorCritic:
        (module,) = (self.module[module_id] for module_id in self.module.keys())  # noqa: SIM118
        actor_critic: ActorCritic = module.actor_critic
        return actor_critic

    def _make_module(self) -> Any:
        """RLlib's module, cut up among the ranks where the settings say so; called by RLlib before the optimiser."""
        module = super()._make_module()
        for module_id in module.keys() if self._settings.config.data_parallel == "fsdp2" else ():
            self._shard(module[module_id].actor_critic)
        return module

    def _shard(self, actor_critic: ActorCritic) -> None:
        device = torch.device(self._device)
        heads = ("value_head",) if actor_critic.value_head is not None else ()
        half = self._settings.model.dtype == "bfloat16"
        shard(actor_critic, torch.distributed.get_world_size(), device, half=half, heads=heads)

    def _load_reference(self, device: torch.device) -> Reference:
        """The frozen policy that the KL is to: the model without its adapters, or one of its own."""
        settings = self._settings
        if settings.config.lora.rank:
            return Reference(self._actor_critic)
        plain = replace(settings.model, path=settings.reference_path, critic="none", is_trained=False)
        model = ActorCritic(plain).to(device).requires_grad_(False)
        if settings.config.data_parallel == "fsdp2":
            self._shard(model)
        return Reference(model)

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
        with self._ranks.agreed():
            batch = make_batch(trajectories, device=self._device)
        return self._step.reference_kl(batch)

    def save_checkpoint(self, path: Path, extra: Mapping[str, str]) -> None:
        """Write all state, each rank what it alone holds; `extra` are text files by their names."""
        actor_critic, first = self._actor_critic, self._ranks.rank == 0
        with checkpoint.shared_folder(path, self._ranks) as folder:
            trained = checkpoint.trained_tensors(actor_critic)
            optimizer = checkpoint.optimizer_tensors(self._optimizer, actor_critic)
            with self._ranks.agreed():
                checkpoint.write_state(folder, {**trained, **optimizer, **self._step.judge.state()}, self._ranks)
            self._write_policy(folder / checkpoint.POLICY)
            with self._ranks.agreed():
                for name, text in extra.items() if first else ():
                    (folder / name).write_text(text)
                if first:
                    checkpoint.write_index(folder, self._version)

    def save_policy(self, path: Path) -> None:
        """Write the policy as a Hugging Face folder."""
        with checkpoint.shared_folder(path, self._ranks) as folder:
            self._write_policy(folder)

    def _write_policy(self, folder: Path) -> None:
        """Gather the policy, which takes every rank, and write it on the first."""
        policy, first = self._actor_critic.policy, self._ranks.rank == 0
        dtype = getattr(torch, self._settings.model.dtype)
        gathered = {n: t.cpu() for n, t in policy_tensors(policy, dtype) if first}
        with self._ranks.agreed():
            if first:
                checkpoint.write_policy(folder, policy.config, gathered, self._settings.model.path)

    def _restore(self, path: Path) -> None:
        state = checkpoint.State(path)
        if state.version != self._version:
            raise InputError(
                str(path), f"holds version {state.version}, but step {self._version + 1} starts from {self._version}"
            )
        checkpoint.restore(state, self._optimizer, self._actor_critic)
        self._step.judge.load({name: state.read(name) for name in self._step.judge.state()})
