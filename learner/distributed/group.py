"""RLlib's LearnerGroup with a louder face: every call has one result for each rank, or raises the error of one.

RLlib says where ranks run and carries the calls; what it hides is made loud here: learners that failed before and
silently train nothing, ranks that wait for one that gave up, errors of the second rank. Knows no mathematics.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Mapping, Sequence
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

from cluster.actors.remote import RemoteActor, kill_actor, within
from cluster.errors import AntiphonError, LearnerDied, LearnerError
from learner.config import LearnerConfig
from learner.distributed.ranks import StoppedWithPeer
from learner.distributed.rllib_learner import RankLearner, RankSettings

START_TIMEOUT_S = 600.0
CREATION_S = 10.0
POLL_S = 0.2
GRACE_S = 5.0
"""How long the other ranks may take to explain the error of one."""
LEAST_CPUS = 0.001
"""A place of no resources at all cannot be reserved."""


class RankGroup(LearnerGroup):
    """RLlib's group, made loud: every call has one result for each rank or raises."""

    _place: PlacementGroup | None

    @classmethod
    def start(cls, settings: RankSettings, learner_class: type[RankLearner], place: PlacementGroup | None) -> RankGroup:
        """Start the ranks at `place` and load their models; blocks. Raises the error of one that could not."""
        # What RLlib would log of ranks that raised, died or were ended is raised here.
        logging.getLogger("ray.rllib.utils.actor_manager").setLevel(logging.CRITICAL)
        group = cls.__new__(cls)
        group._place = place
        config, spec = _algorithm_config(settings, learner_class), _module_spec(settings, learner_class)
        try:
            group.__init__(config=config, module_spec=spec, placement_group=place)  # type: ignore[misc]
        except RayError as error:
            group.shutdown()
            raise first_cause([(0, error)]) from error
        return group

    @property
    def ranks(self) -> list[RemoteActor]:
        """The processes; none where the learner is local."""
        return [
            RemoteActor(f"learner-{rank}", worker) for rank, worker in enumerate(getattr(self, "_workers", None) or ())
        ]

    def call(self, method: str, arguments: Sequence[Mapping[str, Any]]) -> list[Any]:
        """Call a method on every rank, with its own keyword arguments; blocks until all have answered.

        One that raised or died fails the call, though the others may wait for it without end: after an error they are
        given GRACE_S, so that of several errors the one that explains the others can be told.
        """
        if self.is_local:
            return [getattr(self._learner, method)(**arguments[0])]
        manager, answers, give_up_at = self._worker_manager, list[Any](), math.inf
        num_called = manager.foreach_actor_async(method, kwargs=[dict(kw) for kw in arguments])
        while len(answers) < num_called and time.monotonic() < give_up_at and not self._is_shut_down:
            answers += manager.fetch_ready_async_reqs(timeout_seconds=POLL_S)
            give_up_at = min(give_up_at, time.monotonic() + _grace_s(answers))
        return self._get_results(answers)

    def update(self, *, training_data: TrainingData, **_: Any) -> list[Any]:
        """One step, each rank on its own share: RLlib's own update but for the way it waits."""
        parts = training_data.shard(max(1, len(self)))
        return self.call("update", [{"training_data": part, **kw} for part, kw in parts])

    def _get_results(self, answers: Sequence[Any]) -> list[Any]:
        """Results in the order of ranks. Raises the error that came first in cause, or LearnerError if one lacks."""
        errors = [(answer.actor_id, answer.get()) for answer in answers if not answer.ok]
        if errors:
            raise first_cause(errors)
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


def _grace_s(answers: Sequence[Any]) -> float:
    """How long to wait for further answers: for ever while all is well, not at all after a death."""
    errors = [answer.get() for answer in answers if not answer.ok]
    if any(isinstance(error, RayActorError) for error in errors):
        return 0.0
    return GRACE_S if errors else math.inf


def first_cause(errors: Sequence[tuple[int, BaseException]]) -> AntiphonError:
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
    if isinstance(error, RayActorError):
        return LearnerDied(f"learner-{rank}", "its process died")
    lines = str(error).strip().splitlines()
    return LearnerError(f"learner-{rank}", lines[-1] if lines else type(error).__name__)


def _algorithm_config(settings: RankSettings, learner_class: type[RankLearner]) -> PPOConfig:
    config = settings.config
    return (
        PPOConfig()
        .framework("torch")
        .learners(
            num_learners=config.num_learners,
            num_cpus_per_learner=config.num_cpus,
            num_gpus_per_learner=config.num_gpus,
            learner_class=learner_class,
            learner_config_dict={"settings": settings},
            add_default_connectors_to_learner_pipeline=False,
        )
        .fault_tolerance(restart_failed_env_runners=False)
    )


def _module_spec(settings: RankSettings, learner_class: type[RankLearner]) -> MultiRLModuleSpec:
    """The learner's networks among RLlib's modules; the spaces are asked for and not used."""
    spec = RLModuleSpec(
        module_class=learner_class.module_class,
        observation_space=gym.spaces.Box(-1.0, 1.0, (1,), np.float32),
        action_space=gym.spaces.Discrete(2),
        model_config={"settings": settings},
    )
    return MultiRLModuleSpec(rl_module_specs={DEFAULT_MODULE_ID: spec})


async def build(settings: RankSettings, learner_class: type[RankLearner]) -> RankGroup:
    """Build in a thread. Cancelled or late, end the ranks and wait for the thread: Ray's end would leave it hanging.

    Ranks are ended by taking their place away, once they have had the time to be created there: one that is created
    at a place that is gone would be waited for without end.
    """
    num_learners = settings.config.num_learners
    place = _reserve(settings.config)
    building = asyncio.ensure_future(asyncio.to_thread(RankGroup.start, settings, learner_class, place))
    waited_for = f"{max(1, num_learners)} learners to load their models"
    try:
        await within(asyncio.shield(building), START_TIMEOUT_S, where="learner group", waited_for=waited_for)
    except BaseException:
        await asyncio.wait({building}, timeout=CREATION_S)
        _release(place)
        await asyncio.gather(building, return_exceptions=True)
        raise
    return building.result()
