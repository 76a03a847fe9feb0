"""The learner as the driver sees it: a few async calls, each with a deadline, that end in a result or a named error.

RLlib's LearnerGroup says where ranks run and carries the calls; what it hides is made loud here: learners that failed
before and silently train nothing, ranks that wait for a dead one, errors of the second rank. Knows no mathematics.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import ray
from ray.exceptions import RayActorError, RayError
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.learner.learner_group import LearnerGroup
from ray.rllib.core.learner.training_data import TrainingData
from ray.rllib.core.rl_module.multi_rl_module import MultiRLModuleSpec
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from cluster.errors import ActorDied, AntiphonError, DeadlineExceeded, LearnerError
from cluster.remote import RemoteActor, kill_actor, within
from cluster.trajectory import Trajectory
from cluster.weights import Manifest
from learner.batching import balanced, cost
from learner.config import LearnerConfig
from learner.ppo_learner import ActorCriticModule, TrajectoryLearner
from learner.ppo_rank import LearnerSettings, RankResult, model_settings
from learner.ppo_step import Share
from learner.ranks import StoppedWithPeer
from learner.training_loop import Groups, StepResult

START_TIMEOUT_S = 600.0
CREATION_S = 10.0
WATCH_EVERY_S = 0.5
LEAST_CPUS = 0.001
"""A place of no resources at all cannot be reserved."""


def split(groups: Groups, num_ranks: int) -> list[Share]:
    """Whole groups for each rank, in admission order, that cost about the same to compute."""
    if len(groups) < num_ranks:
        raise LearnerError("learner.num_learners", f"{len(groups)} groups are too few for {num_ranks} learners")
    ends = [0, *accumulate(map(len, groups))]
    costs = [sum(cost(len(trajectory.token_ids)) for trajectory in group) for group in groups]
    shares = []
    for numbers in balanced(costs, num_ranks):
        places = [place for number in numbers for place in range(ends[number], ends[number + 1])]
        shares.append(Share([t for number in numbers for t in groups[number]], places, ends[-1]))
    return shares


@dataclass
class StepData(TrainingData):
    """A step's trajectories, one share a rank: what RLlib carries from the group to its learners."""

    step: int = 0
    shares: Sequence[Share] = ()

    def validate(self) -> None:
        """Nothing to choose between: there are only shares."""

    def shard(self, num_shards: int, **_: Any) -> list[tuple[StepData, dict[str, Any]]]:
        """One part for each rank."""
        return [(StepData(step=self.step, shares=[share]), {}) for share in self.shares]

    def solve_refs(self) -> None:
        """Nothing: trajectories travel by value."""

    @property
    def share(self) -> Share:
        """The only share, on the rank that it was sent to."""
        (share,) = self.shares
        return share


class RankGroup(LearnerGroup):
    """RLlib's group, made loud: every call has one result for each rank or raises."""

    _place: PlacementGroup | None

    @classmethod
    def build(cls, settings: LearnerSettings, place: PlacementGroup | None) -> RankGroup:
        """Start the ranks at `place` and load their models; blocks. Raises the error of one that could not."""
        group = cls.__new__(cls)
        group._place = place
        try:
            group.__init__(  # type: ignore[misc]
                config=_algorithm_config(settings), module_spec=_module_spec(settings), placement_group=place
            )
        except RayError as error:
            group.shutdown()
            raise _first_cause([(0, error)]) from error
        return group

    @property
    def ranks(self) -> list[RemoteActor]:
        """The processes; none where the learner is local."""
        return [
            RemoteActor(f"learner-{rank}", worker) for rank, worker in enumerate(getattr(self, "_workers", None) or ())
        ]

    def call(self, method: str, arguments: Sequence[Mapping[str, Any]]) -> list[Any]:
        """Call a method on every rank, with its own keyword arguments; blocks until all have answered.

        By name and not by function: RLlib ends the process of a learner whose function raised.
        """
        if self.is_local:
            return [getattr(self._learner, method)(**arguments[0])]
        return self._get_results(self._worker_manager.foreach_actor(method, kwargs=[dict(kw) for kw in arguments]))

    def _get_results(self, results: Any) -> list[Any]:
        """Results in the order of ranks. Raises the error that came first in cause, or LearnerError if one lacks."""
        answers = list(results)
        errors = [(answer.actor_id, answer.get()) for answer in answers if not answer.ok]
        if errors:
            raise _first_cause(errors)
        if len(answers) != len(self):
            raise LearnerError("learner group", f"{len(answers)} of {len(self)} learners answered; the others are gone")
        return [answer.get() for answer in sorted(answers, key=lambda answer: answer.actor_id)]

    def shutdown(self) -> None:
        """End every rank's process now, which also wakes whoever waits for its answer.

        Ranks have nothing to put in order: all that lasts is written by then.
        """
        self._is_shut_down = True
        for rank in self.ranks:
            kill_actor(rank)
        _release(self._place)


def _reserve(config: LearnerConfig) -> PlacementGroup | None:
    """A place for each remote rank, so that whoever gives up a start can end ranks that RLlib still waits for."""
    if config.num_learners == 0:
        return None
    resources = {"CPU": max(config.num_cpus, LEAST_CPUS)} | ({"GPU": config.num_gpus} if config.num_gpus else {})
    return placement_group([resources] * config.num_learners, strategy="PACK")


def _release(place: PlacementGroup | None) -> None:
    """Give the place back, which ends the ranks that are there."""
    if place is not None and ray.is_initialized():
        remove_placement_group(place)


def _first_cause(errors: Sequence[tuple[int, BaseException]]) -> AntiphonError:
    """Of the errors of several ranks the one that explains the others: a death, then an error of ours, then any."""
    causes = [(rank, getattr(error, "cause", None) or error) for rank, error in errors]

    def weight(item: tuple[int, BaseException]) -> int:
        error = item[1]
        if isinstance(error, RayActorError):
            return 0
        if isinstance(error, StoppedWithPeer):
            return 3
        return 1 if isinstance(error, AntiphonError) else 2

    rank, error = min(causes, key=weight)
    if isinstance(error, AntiphonError):
        return error
    lines = str(error).strip().splitlines()
    what = "its process died" if isinstance(error, RayActorError) else (lines[-1] if lines else type(error).__name__)
    return LearnerError(f"learner-{rank}", what)


def _algorithm_config(settings: LearnerSettings) -> PPOConfig:
    config = settings.config
    return (
        PPOConfig()
        .framework("torch")
        .learners(
            num_learners=config.num_learners,
            num_cpus_per_learner=config.num_cpus,
            num_gpus_per_learner=config.num_gpus,
            learner_class=TrajectoryLearner,
            learner_config_dict={"settings": settings},
            add_default_connectors_to_learner_pipeline=False,
        )
        .fault_tolerance(restart_failed_env_runners=False)
    )


def _module_spec(settings: LearnerSettings) -> MultiRLModuleSpec:
    """The actor-critic among RLlib's modules; the spaces are asked for and not used."""
    spec = RLModuleSpec(
        module_class=ActorCriticModule,
        observation_space=gym.spaces.Box(-1.0, 1.0, (1,), np.float32),
        action_space=gym.spaces.Discrete(2),
        model_config={"settings": settings},
    )
    return MultiRLModuleSpec(rl_module_specs={DEFAULT_MODULE_ID: spec})


class PPOLearnerGroup:
    """The learners of a run. After any error the group is ended and every later call says so.

    Calls run one after the other. Each waits for all ranks, off the event loop, and raises LearnerError where one of
    them failed or died and DeadlineExceeded where they took longer than `step_timeout_s`.
    """

    def __init__(self, group: RankGroup, settings: LearnerSettings, *, first_step: int, incarnation: str) -> None:
        self._group = group
        self._config = settings.config
        self._next_step = first_step
        self._incarnation = incarnation
        self._turn = asyncio.Lock()
        self._ended_by: BaseException | None = None

    @classmethod
    async def start(
        cls,
        config: LearnerConfig,
        *,
        model_path: Path,
        reference_path: Path,
        dtype: str = "float32",
        temperature: float = 1.0,
        seed: int = 0,
        first_step: int = 1,
        checkpoint_path: Path | None = None,
        probe_token_ids: Sequence[Sequence[int]] | None = None,
        incarnation: str | None = None,
        log_dir: Path | None = None,
        critic_path: Path | None = None,
    ) -> PPOLearnerGroup:
        """Start the ranks with the weights of version `first_step` - 1: the checkpoint's, or else the model folder's.

        `probe_token_ids` are whole sequences (default: drawn from the vocabulary). Waits for all ranks to have loaded
        their models. Raises the error of one that did not, DeadlineExceeded after START_TIMEOUT_S.
        """
        settings = LearnerSettings(
            config=config,
            model=model_settings(config, Path(model_path), dtype, temperature, seed=seed, critic_path=critic_path),
            reference_path=Path(reference_path),
            seed=seed,
            version=first_step - 1,
            checkpoint_path=checkpoint_path,
            probe_token_ids=tuple(map(tuple, probe_token_ids)) if probe_token_ids else None,
            log_dir=log_dir,
        )
        group = await _build(settings)
        return cls(group, settings, first_step=first_step, incarnation=incarnation or uuid.uuid4().hex)

    async def step(self, step: int, groups: Groups) -> StepResult:
        """All epochs and mini-batches on one batch; the manifest is version `step`, to be published."""
        started = time.monotonic()
        if step != self._next_step:
            raise LearnerError("learner group", f"step {step} was asked for, but the next one is {self._next_step}")
        shares = split(groups, max(1, self._config.num_learners))
        data = StepData(step=step, shares=shares)
        results: list[RankResult] = await self._run(f"step {step}", lambda: self._group.update(training_data=data))
        self._next_step += 1
        metrics = {**results[0].metrics, "learner/step_s": time.monotonic() - started}
        num_done = int(metrics["learner/num_optimizer_steps"])
        return StepResult(results[0].publication.manifest(self._incarnation), metrics, num_done)

    async def publish_initial(self) -> Manifest:
        """The manifest of the weights that the group started with."""
        publications = await self._call("publish", [{}] * self._num_ranks)
        manifest: Manifest = publications[0].manifest(self._incarnation)
        return manifest

    async def reference_kl(self, trajectories: Sequence[Trajectory]) -> list[float]:
        """k1 to the reference policy summed over each response, in nats, from the behaviour log-probabilities."""
        if not trajectories:
            return []
        total, ranks = len(trajectories), self._num_ranks
        bounds = list(pairwise(total * rank // ranks for rank in range(ranks + 1)))
        parts = [{"trajectories": trajectories[a:b] or trajectories[:1]} for a, b in bounds]
        answers = await self._call("reference_kl", parts)
        return [kl for answer, (a, b) in zip(answers, bounds, strict=True) for kl in answer[: b - a]]

    async def save_checkpoint(self, path: Path, *, extra: Mapping[str, str] | None = None) -> None:
        """Write all that is needed to go on exactly, whole or not at all; `extra` are text files beside it by name."""
        await self._call("save_checkpoint", [{"path": path, "extra": dict(extra or {})}] * self._num_ranks)

    async def save_policy(self, path: Path) -> None:
        """Write the policy as a Hugging Face folder with its tokenizer, whole or not at all."""
        await self._call("save_policy", [{"path": path}] * self._num_ranks)

    async def shutdown(self) -> None:
        """End the ranks' processes. Write what must last before."""
        self._ended_by = self._ended_by or LearnerError("learner group", "it was shut down")
        await asyncio.to_thread(self._group.shutdown)

    @property
    def _num_ranks(self) -> int:
        return max(1, self._config.num_learners)

    async def _call(self, method: str, arguments: Sequence[Mapping[str, Any]]) -> list[Any]:
        return await self._run(method, lambda: self._group.call(method, arguments))

    async def _run(self, what: str, function: Callable[[], list[Any]]) -> list[Any]:
        async with self._turn:
            if self._ended_by is not None:
                raise LearnerError("learner group", f"it has ended: {self._ended_by}")
            try:
                return await self._watched(what, function)
            except BaseException as error:
                self._ended_by = error
                self._group.shutdown()
                raise

    async def _watched(self, what: str, function: Callable[[], list[Any]]) -> list[Any]:
        """Run the blocking call in a thread until it ends, a rank dies or its time is over."""
        work = asyncio.create_task(asyncio.to_thread(function))
        death = asyncio.create_task(_first_death(self._group.ranks))
        timeout_s = self._config.step_timeout_s
        try:
            done, _ = await asyncio.wait({work, death}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if work in done:
                return work.result()
            if death in done:
                death.result()
            waited_for = f"{self._num_ranks} learners to finish {what}"
            raise DeadlineExceeded("learner group", f"waited {timeout_s:g} s for {waited_for}")
        except (ActorDied, RayError) as error:
            raise _first_cause([(0, error)]) from error
        finally:
            work.cancel()
            death.cancel()
            await asyncio.gather(death, return_exceptions=True)


async def _build(settings: LearnerSettings) -> RankGroup:
    """Build in a thread. Cancelled or late, end the ranks and wait for the thread: Ray's end would leave it hanging.

    Ranks are ended by taking their place away, once they have had the time to be created there: one that is created
    at a place that is gone would be waited for without end.
    """
    num_learners = settings.config.num_learners
    place = _reserve(settings.config)
    building = asyncio.ensure_future(asyncio.to_thread(RankGroup.build, settings, place))
    waited_for = f"{max(1, num_learners)} learners to load their models"
    try:
        await within(asyncio.shield(building), START_TIMEOUT_S, where="learner group", waited_for=waited_for)
    except BaseException:
        await asyncio.wait({building}, timeout=CREATION_S)
        _release(place)
        await asyncio.gather(building, return_exceptions=True)
        raise
    return building.result()


async def _first_death(ranks: Sequence[RemoteActor]) -> None:
    """Wait until a rank is gone and raise LearnerError with its name; for ever where the learner is local.

    A ping waits its turn behind the call under way, and fails at once when the process ends.
    """

    async def watch(rank: RemoteActor) -> None:
        while True:
            await rank.ping()
            await asyncio.sleep(WATCH_EVERY_S)

    if not ranks:
        await asyncio.Event().wait()
    try:
        await asyncio.gather(*map(watch, ranks))
    except ActorDied as error:
        raise LearnerError(error.where, "its process died") from error
