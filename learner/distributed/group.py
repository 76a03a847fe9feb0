"""RLlib's LearnerGroup, but every call returns one result per rank or raises.

RLlib places the ranks and carries the calls. This module raises what RLlib hides: ranks that died or failed earlier,
ranks that wait for one that gave up, and the errors of every rank but the first.
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
"""After an error, how long to wait for the other ranks' errors, one of which may be the cause."""
LEAST_CPUS = 0.001
"""Ray cannot reserve a bundle without resources."""


class _LearnerGroup(LearnerGroup):
    """RLlib's group without its own shutdown: `RankGroup` kills the ranks."""

    def __del__(self) -> None:
        """No-op: RLlib would wait for ranks that may be dead."""


class RankGroup:
    """RLlib's learner group `group`, whose remote ranks run in `place`.

    Call it from one thread at a time.
    """

    def __init__(self, group: LearnerGroup, place: PlacementGroup | None) -> None:
        self._group = group
        self._place = place
        self._is_shut_down = False

    @classmethod
    def start(cls, settings: RankSettings, learner_class: type[RankLearner], place: PlacementGroup | None) -> RankGroup:
        """Start the ranks in `place` and load their models; blocks.

        Raises the error of a rank that failed to start.
        """
        # RLlib would log failed, dead and stopped ranks; they are raised as errors instead.
        logging.getLogger("ray.rllib.utils.actor_manager").setLevel(logging.CRITICAL)
        config, spec = _algorithm_config(settings, learner_class), _module_spec(settings, learner_class)
        try:
            return cls(_LearnerGroup(config=config, module_spec=spec, placement_group=place), place)
        except RayError as error:
            _release(place)
            raise first_cause([(0, error)]) from error

    @property
    def ranks(self) -> list[RemoteActor]:
        """The ranks' processes; empty if the learner is local."""
        return [RemoteActor(f"learner-{rank}", worker) for rank, worker in enumerate(self._group._workers or ())]

    def call_rank(self, name: str, arguments: Sequence[Sequence[Any]]) -> list[Any]:
        """Call the method `name` of every rank, rank r with `arguments[r]`.

        Returns their results in rank order.

        Blocks until all ranks answered. If one raises or dies, waits at most GRACE_S for the others, which may wait
        for it indefinitely, and raises the error that explains the rest.
        """
        return self._call("call_rank", [{"name": name, "arguments": own} for own in arguments])

    def update(self, training_data: TrainingData) -> list[Any]:
        """Train one step, each rank on its own part of the data.

        As RLlib's `update`, but waits as `call_rank` does.
        """
        parts = training_data.shard(max(1, len(self._group)))
        return self._call("update", [{"training_data": part, **options} for part, options in parts])

    def _call(self, method: str, arguments: Sequence[Mapping[str, Any]]) -> list[Any]:
        """Call a method of RLlib's learner on every rank, with its own keyword arguments."""
        if self._group.is_local:
            return [getattr(self._group._learner, method)(**arguments[0])]
        manager, answers, give_up_at = self._group._worker_manager, list[Any](), math.inf
        num_called = manager.foreach_actor_async(method, kwargs=[dict(options) for options in arguments])
        while len(answers) < num_called and time.monotonic() < give_up_at and not self._is_shut_down:
            answers += manager.fetch_ready_async_reqs(timeout_seconds=POLL_S)
            give_up_at = min(give_up_at, time.monotonic() + _grace_s(answers))
        return self._results(answers)

    def _results(self, answers: Sequence[Any]) -> list[Any]:
        """Return results in rank order.

        Raises the ranks' `first_cause`, or LearnerError if a result is missing.
        """
        errors = [(answer.actor_id, answer.get()) for answer in answers if not answer.ok]
        if errors:
            raise first_cause(errors)
        num_ranks = len(self._group)
        if len(answers) != num_ranks:
            raise LearnerError("learner group", f"{len(answers)} of {num_ranks} learners answered; the others are gone")
        return [answer.get() for answer in sorted(answers, key=lambda answer: answer.actor_id)]

    def shutdown(self) -> None:
        """Kill every rank's process, which also wakes callers that wait for its answer.

        Write what must last before.
        """
        self._is_shut_down = True
        for rank in self.ranks:
            kill_actor(rank)
        _release(self._place)


def _reserve(config: LearnerConfig) -> PlacementGroup | None:
    """Reserve a bundle per remote rank, so that a cancelled start can kill ranks RLlib still waits for."""
    if config.num_learners == 0:
        return None
    resources = {"CPU": max(config.num_cpus, LEAST_CPUS)} | ({"GPU": config.num_gpus} if config.num_gpus else {})
    return placement_group([resources] * config.num_learners, strategy="PACK")


def _release(place: PlacementGroup | None) -> None:
    """Remove the placement group, which kills the ranks in it."""
    if place is not None and ray.is_initialized():
        remove_placement_group(place)


def _grace_s(answers: Sequence[Any]) -> float:
    """How long to wait for further answers: without limit if none failed, not at all after a death."""
    errors = [answer.get() for answer in answers if not answer.ok]
    if any(isinstance(error, RayActorError) for error in errors):
        return 0.0
    return GRACE_S if errors else math.inf


def first_cause(errors: Sequence[tuple[int, BaseException]]) -> AntiphonError:
    """Choose the error that explains the others: a death, then an AntiphonError, then any other."""
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
    """Wrap the learner's networks as an RLlib module. RLlib requires the spaces; they are not used."""
    spec = RLModuleSpec(
        module_class=learner_class.module_class,
        observation_space=gym.spaces.Box(-1.0, 1.0, (1,), np.float32),
        action_space=gym.spaces.Discrete(2),
        model_config={"settings": settings},
    )
    return MultiRLModuleSpec(rl_module_specs={DEFAULT_MODULE_ID: spec})


async def build(settings: RankSettings, learner_class: type[RankLearner]) -> RankGroup:
    """Start a group in a thread. If cancelled or late, kill the ranks and wait for the thread to end.

    Otherwise the thread would hang when Ray shuts down. The placement group is removed only after CREATION_S: RLlib
    would wait indefinitely for a rank created in a removed one.
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
