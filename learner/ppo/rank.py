"""One rank of the PPO learner: its networks, optimiser, step, publication and checkpoints.

Imports no RLlib.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from cluster.errors import InputError, LearnerError
from cluster.trajectory import Trajectory
from cluster.weights.manifest import Manifest
from learner import checkpoint
from learner.config import LearnerConfig, critic_of
from learner.distributed.ranks import Ranks
from learner.distributed.sharding import shard
from learner.model.actor_critic import ActorCritic, ModelSettings, Reference
from learner.model.lora import ADAPTER_FOLDER, adapter_tensors, has_inputs_first, write_adapter
from learner.model.tensors import policy_tensors
from learner.place import Place
from learner.ppo.batch import make_batch
from learner.ppo.explanation import Explanation, Watched
from learner.ppo.schedule import Lengths, Phase, phase_at
from learner.ppo.shares import Share
from learner.ppo.step import PPOStep
from learner.ppo.weights import WeightPublisher, default_probe


def _new_incarnation() -> str:
    return uuid.uuid4().hex


@dataclass(frozen=True, slots=True)
class LearnerSettings:
    """Everything that a rank is built from.

    `version` is that of the weights: the checkpoint's, or else the model's.

    `tasks` are the run's task names, if it names any. `lengths` are the planned numbers of steps, by version.
    `phases` are the settings of each time, if they changed. `probe_token_ids` are whole sequences (default: drawn from
    the vocabulary).
    """

    config: LearnerConfig
    place: Place
    temperature: float = 1.0
    tasks: tuple[str, ...] = ()
    lengths: Lengths = ()
    phases: tuple[Phase, ...] = ()
    version: int = 0
    incarnation: str = field(default_factory=_new_incarnation)
    probe_token_ids: tuple[tuple[int, ...], ...] | None = None

    @property
    def log_dir(self) -> Path | None:
        """The folder of the ranks' logs."""
        return self.place.log_dir

    def model(self) -> ModelSettings:
        """Return the settings of the networks.

        Raises InputError if the critic needs a reward model that is missing.
        """
        critic = critic_of(self.config)
        return ModelSettings.from_config(self.config, self.place, self.temperature, critic=critic)


@dataclass(frozen=True, slots=True)
class RankResult:
    """A rank's result of a step; only the first rank's manifest has tensors."""

    metrics: dict[str, float]
    manifest: Manifest


def shard_actor_critic(model: ActorCritic, settings: LearnerSettings, num_ranks: int, device: torch.device) -> None:
    """Shard the networks over the ranks; the value head stays in full precision. Collective."""
    heads = ("value_head",) if model.value_head is not None else ()
    shard(model, num_ranks, device, half=settings.place.dtype == "bfloat16", heads=heads)


class PPORank:
    """Trains and saves one rank.

    Every method is collective. `model` and `optimizer` must be ready to train.
    """

    def __init__(
        self,
        settings: LearnerSettings,
        model: ActorCritic,
        optimizer: torch.optim.Optimizer,
        ranks: Ranks,
        device: torch.device,
    ) -> None:
        self._settings = settings
        self._model = model
        self._optimizer = optimizer
        self._ranks = ranks
        self._device = device
        self._version = settings.version
        reference = self._load_reference()
        first = phase_at(settings.version + 1, settings.phases)
        self._step = PPOStep(
            first.config if first else settings.config,
            model,
            reference,
            optimizer,
            ranks,
            device=device,
            seed=settings.place.seed,
            tasks=settings.tasks,
            lengths=settings.lengths,
            phases=settings.phases,
        )
        if settings.place.checkpoint_path is not None:
            self._restore(settings.place.checkpoint_path)
        probe = settings.probe_token_ids or default_probe(model.policy.config, settings.place.seed)
        self._publisher = WeightPublisher(
            model, probe, device, settings.place.dtype, settings.incarnation, settings.config.weight_carrier
        )

    def _load_reference(self) -> Reference:
        """Load the frozen reference policy: the model without its adapters, or a separate model."""
        settings = self._settings
        if settings.config.lora.rank:
            if settings.place.reference != settings.place.model_path:
                raise InputError("learner.lora", "the reference is the model without its adapters, not another one")
            return Reference(self._model)
        plain = replace(settings.model(), path=settings.place.reference, critic="none", is_trained=False)
        model = ActorCritic(plain).to(self._device).requires_grad_(False)
        if self._model.is_sharded:
            shard_actor_critic(model, settings, self._ranks.size, self._device)
        return Reference(model)

    def update(self, step: int, share: Share) -> RankResult:
        """Train one step on this rank's share, then publish the next version."""
        started = time.monotonic()
        metrics = self._step.run(step, share)
        self._version = step
        manifest = self.publish()
        return RankResult({**metrics, "learner/step_s": time.monotonic() - started}, manifest)

    def explain(self, step: int, share: Share, uid: str) -> Explanation:
        """Train one step as `update` does.

        Returns the values and advantages of one trajectory of this rank's share.
        """
        own = [trajectory for trajectory in share.trajectories if trajectory.uid == uid]
        if not own:
            raise LearnerError(f"trajectory {uid}", "it was not trained in this step", uids=[uid])
        watched = Watched(uid)
        self._step.run(step, share, on_experience=watched.keep)
        self._version = step
        return watched.explained(self._step.logprobs(make_batch(own, device=self._device))[0])

    def publish(self) -> Manifest:
        """Make the manifest of the current version."""
        return self._publisher.publish(self._version, with_tensors=self._ranks.rank == 0)

    def set_incarnation(self, incarnation: str) -> None:
        """Publish under this incarnation from now on."""
        self._publisher.incarnation = incarnation

    def reference_kl(self, trajectories: Sequence[Trajectory]) -> list[float]:
        """Compute k1 from the behaviour policy to the reference, summed over each response, in nats."""
        with self._ranks.agreed():
            batch = make_batch(trajectories, device=self._device)
        return self._step.reference_kl(batch)

    def save_checkpoint(self, path: Path, extra: Mapping[str, str]) -> None:
        """Write a checkpoint, each rank its own part of the state; `extra` are further text files by name."""
        first = self._ranks.rank == 0
        with checkpoint.shared_folder(path, self._ranks) as folder:
            trained = checkpoint.trained_tensors(self._model)
            optimizer = checkpoint.optimizer_tensors(self._optimizer, self._model)
            with self._ranks.agreed():
                checkpoint.write_state(folder, {**trained, **optimizer, **self._step.computer.state()}, self._ranks)
            self._write_policy(folder / checkpoint.POLICY)
            with self._ranks.agreed():
                for name, text in extra.items() if first else ():
                    (folder / name).write_text(text)
                if first:
                    checkpoint.write_index(folder, self._version)

    def save_policy(self, path: Path) -> None:
        """Write the policy as a Hugging Face model folder."""
        with checkpoint.shared_folder(path, self._ranks) as folder:
            self._write_policy(folder)

    def _write_policy(self, folder: Path) -> None:
        """Gather the policy and write it on the first rank, with merged adapters and the adapters separately."""
        policy, first = self._model.policy, self._ranks.rank == 0
        dtype = getattr(torch, self._settings.place.dtype)
        gathered = {name: tensor.cpu() for name, tensor in policy_tensors(policy, dtype) if first}
        adapter = {name: tensor.to("cpu", dtype).contiguous() for name, tensor in adapter_tensors(policy) if first}
        with self._ranks.agreed():
            if first:
                checkpoint.write_policy(folder, policy.config, gathered, self._settings.place.model_path)
            if adapter:
                lora, base = self._settings.config.lora, self._settings.place.model_path
                inputs_first = has_inputs_first(policy)
                write_adapter(folder / ADAPTER_FOLDER, adapter, lora, base, inputs_first=inputs_first)

    def _restore(self, path: Path) -> None:
        state = checkpoint.State(path)
        if state.version != self._version:
            raise InputError(
                str(path), f"holds version {state.version}, but step {self._version + 1} starts from {self._version}"
            )
        checkpoint.restore(state, self._optimizer, self._model)
        self._step.computer.load({name: state.read(name) for name in self._step.computer.state()})
