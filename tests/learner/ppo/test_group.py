"""The group on a real Ray: equal weights on 0, 1 and 2 learners, exact resumption, raised errors."""

from __future__ import annotations

import asyncio
import inspect
import os
import signal
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cluster.errors import DeadlineExceeded, InputError, LearnerDied, LearnerError
from cluster.trajectory import Trajectory
from cluster.weights.manifest import Manifest
from cluster.weights.object_store import fetch_tensors
from learner.config import ConstraintConfig, LearnerConfig
from learner.place import Place
from learner.ppo.schedule import Phase
from learner.training_loop import StepResult
from tests.learner.conftest import make_trajectory, make_two_turn_trajectory, rank_process_ids

CONFIG = LearnerConfig(
    num_learners=0,
    num_epochs=2,
    num_minibatches=2,
    learning_rate=1e-3,
    critic="separate",
    kl_target=0.5,
    kl_horizon=100.0,
    constraint=ConstraintConfig(cost="cost", max_mean=0.3),
    num_cpus=0.1,
)
PROBE = ((1, 2, 3, 4), (5, 6))


async def start_group(num_learners: int, policy_path: Path, *, path: Path | None = None, **options: Any) -> Any:
    from learner.ppo.group import PPOLearnerGroup
    from learner.ppo.rank import LearnerSettings

    config = CONFIG.model_copy(update={"num_learners": num_learners, **options.pop("changes", {})})
    checkpoint = options.pop("checkpoint_path", None)
    place = Place(path or policy_path, reference_path=policy_path, checkpoint_path=checkpoint)
    return await PPOLearnerGroup.start(LearnerSettings(config, place, 0.7, probe_token_ids=PROBE, **options))


@dataclass
class Trained:
    """Groups of 0, 1 and 2 remote learners after the same three steps, with their results."""

    groups: list[Any]
    first: list[Manifest]
    results: list[StepResult]
    kl: list[list[float]]


async def train_side_by_side(policy_path: Path) -> Trained:
    groups = await asyncio.gather(
        *(start_group(num_learners, policy_path, incarnation="run-7") for num_learners in range(3))
    )
    first = [await group.publish_initial() for group in groups]
    results = [await steps(group, range(1, 4)) for group in groups]
    trajectories = [trajectory for group in groups_of(4) for trajectory in group]
    return Trained(list(groups), first, results, [await group.reference_kl(trajectories) for group in groups])


@pytest.fixture(scope="module")
def trained(ray_session: None, policy_path: Path) -> Iterator[Trained]:
    """Started once; a test that shuts a group down must be the last one to use it."""
    trained = asyncio.run(train_side_by_side(policy_path))
    yield trained
    for group in trained.groups:
        asyncio.run(group.shutdown())


@pytest.fixture
async def start(ray_session: None, policy_path: Path) -> Any:
    """Return `start(num_learners, **options)`, whose groups are shut down after the test."""
    groups = []

    async def start(num_learners: int, **options: Any) -> Any:
        groups.append(await start_group(num_learners, policy_path, **options))
        return groups[-1]

    yield start
    await asyncio.gather(*(group.shutdown() for group in groups))


def groups_of(step: int, num: int = 8) -> list[list[Trajectory]]:
    """Make groups, half of them sampled by the version before if there was one."""
    plain = [make_trajectory(i, version=max(0, step - 1 - i % 2), seed=step) for i in range(num - 1)]
    plain.append(make_two_turn_trajectory(num - 1, version=max(0, step - 2) if step > 1 else -1, seed=step))
    return [plain[i : i + 2] for i in range(0, num, 2)]


ONE_TOKEN = dict.fromkeys(("learner/clip_fraction", "learner/value_clip_fraction"), 0.012)
"""Rounding may put one token of the 90 on the other side of a clip."""


def timeless(result: StepResult) -> dict[str, float]:
    return {name: value for name, value in result.metrics.items() if name != "learner/step_s"}


def tensors(manifest: Manifest) -> dict[str, Tensor]:
    return fetch_tensors(manifest, timeout_s=30)


def checksums(manifest: Manifest) -> list[str]:
    return [entry.checksum for entry in manifest.tensors]


async def steps(group: Any, numbers: range) -> Any:
    for number in numbers:
        result = await group.step(number, groups_of(number))
    return result


Start = Callable[..., Awaitable[Any]]


@pytest.mark.ray
def test_local_and_remote_learner_agree_bit_for_bit(trained: Trained) -> None:
    local, remote = trained.results[:2]
    assert checksums(local.manifest) == checksums(remote.manifest)
    assert local.manifest.probe == remote.manifest.probe
    assert timeless(local) == timeless(remote)
    assert trained.kl[0] == trained.kl[1]
    assert local.num_optimizer_steps == 4


@pytest.mark.ray
def test_two_ranks_agree_with_one_to_1e_5(trained: Trained) -> None:
    one, two = trained.results[1:]
    whole, sharded = tensors(one.manifest), tensors(two.manifest)
    for name, tensor in whole.items():
        assert float((tensor - sharded[name]).norm() / tensor.norm()) < 1e-5, name
    last_bits, both = dict.fromkeys(timeless(one), 1e-5) | ONE_TOKEN, timeless(two)
    for name, value in timeless(one).items():
        assert both[name] == pytest.approx(value, rel=1e-4, abs=last_bits[name]), name
    assert both.keys() == timeless(one).keys()
    assert trained.kl[2] == pytest.approx(trained.kl[1], abs=1e-5)
    assert len(trained.kl[1]) == 8


@pytest.mark.ray
def test_a_manifest_has_a_whole_version_with_both_probes(trained: Trained, policy_path: Path) -> None:
    from learner.model.actor_critic import ActorCritic, ModelSettings
    from learner.ppo.weights import probe_logprobs

    first, last = trained.first[1], trained.results[1].manifest
    model = ActorCritic(ModelSettings(policy_path, "float32", "none", 1.0))
    assert (first.version, first.incarnation, first.previous_probe) == (0, "run-7", None)
    assert first.probe == probe_logprobs(model, PROBE, torch.device("cpu"))
    model.policy.load_state_dict(tensors(last))
    assert (last.version, last.incarnation, last.probe_token_ids) == (3, "run-7", PROBE)
    assert last.probe == probe_logprobs(model, PROBE, torch.device("cpu"))
    assert last.previous_probe not in (last.probe, first.probe)


@pytest.mark.ray
async def test_a_resumed_run_continues_bit_for_bit(start: Start, tmp_path: Path) -> None:
    whole = await start(0)
    await steps(whole, range(1, 3))
    await whole.save_checkpoint(tmp_path / "step-2", extra={"position.json": "{}"})
    uninterrupted = await steps(whole, range(3, 5))
    resumed = await start(0, checkpoint_path=tmp_path / "step-2", version=2)
    assert (await resumed.publish_initial()).version == 2
    assert checksums((await steps(resumed, range(3, 5))).manifest) == checksums(uninterrupted.manifest)

    await whole.save_checkpoint(tmp_path / "whole")
    await resumed.save_checkpoint(tmp_path / "resumed")
    states = [(tmp_path / name / "state-00000-00000.safetensors").read_bytes() for name in ("whole", "resumed")]
    assert states[0] == states[1]
    assert (tmp_path / "step-2" / "position.json").exists()
    await whole.save_policy(tmp_path / "policy")
    assert (tmp_path / "policy" / "tokenizer.json").exists()


@pytest.mark.ray
@pytest.mark.parametrize(
    "changes",
    [
        {"learning_rate": 5e-4, "weight_decay": 0.1, "clip": 0.1},
        {"kl_target": None, "kl_coefficient": 0.2, "entropy_coefficient": 0.01},
        {"num_epochs": 1, "num_minibatches": 1, "normalize_rewards": True},
    ],
)
async def test_a_replay_over_changed_settings_is_bit_for_bit(
    start: Start, tmp_path: Path, changes: dict[str, Any]
) -> None:
    changed = CONFIG.model_copy(update=changes)
    phases = (Phase(0, CONFIG, 0.7), Phase(3, changed, 0.9))
    before = await start(0)
    await steps(before, range(1, 3))
    await before.save_checkpoint(tmp_path / "step-2")
    resumed = await start(0, checkpoint_path=tmp_path / "step-2", version=2, changes=changes, phases=phases)
    result = await steps(resumed, range(3, 6))
    replay, same = await start(0, phases=phases), await start(0)
    old, old_same = await steps(replay, range(1, 4)), await steps(same, range(1, 4))
    assert checksums(old.manifest) == checksums(old_same.manifest), "steps 1 to 3 have the settings of before"
    assert checksums((await steps(replay, range(4, 6))).manifest) == checksums(result.manifest)
    assert checksums((await steps(same, range(4, 6))).manifest) != checksums(result.manifest)


async def test_a_checkpoint_of_the_wrong_version_is_refused(start: Start, tmp_path: Path) -> None:
    group = await start(0)
    await steps(group, range(1, 2))
    await group.save_checkpoint(tmp_path / "step-1")
    with pytest.raises(InputError, match="holds version 1, but step 5 starts from 4"):
        await start(0, checkpoint_path=tmp_path / "step-1", version=4)


@pytest.mark.ray
async def test_an_error_on_one_rank_ends_the_step_on_all(trained: Trained) -> None:
    group = trained.groups[2]
    groups = groups_of(4)
    groups[3][0] = replace(groups[3][0], reward=float("nan"))
    started = time.monotonic()
    with pytest.raises(LearnerError, match="trajectory 4-6-0: its reward is nan") as failure:
        await group.step(4, groups)
    assert failure.value.uids == ("4-6-0",)
    assert time.monotonic() - started < 20
    with pytest.raises(LearnerError, match="it has ended: trajectory 4-6-0: its reward is nan"):
        await group.step(4, groups_of(4))


@pytest.mark.slow
@pytest.mark.ray
async def test_a_killed_learner_is_an_error_within_seconds_not_a_hang(start: Start) -> None:
    group = await start(2, changes={"num_epochs": 2000})
    process_id = (await rank_process_ids(group))[1]
    stepping = asyncio.create_task(group.step(1, groups_of(1)))
    await asyncio.sleep(1.5)
    os.kill(process_id, signal.SIGKILL)
    killed = time.monotonic()
    with pytest.raises(LearnerError, match="learner-1: its process died"):
        await stepping
    assert time.monotonic() - killed < 20


@pytest.mark.ray
async def test_an_error_on_one_rank_is_raised_while_the_other_waits_for_it(start: Start) -> None:
    """Rank 1 raises before a sum over ranks, in which rank 0 then waits indefinitely."""
    from learner.ppo.shares import split

    group = await start(2)
    started = time.monotonic()
    with pytest.raises(LearnerError, match=r"learner-1: .* has no attribute 'trajectories'"):
        await group._call_each("update", [(1, split(groups_of(1), 2)[0]), (1, None)])
    assert time.monotonic() - started < 15
    with pytest.raises(LearnerError, match="it has ended: learner-1"):
        await group.publish_initial()


def test_first_cause_is_the_error_that_explains_the_others() -> None:
    from ray.exceptions import ActorDiedError

    from learner.distributed.group import first_cause
    from learner.distributed.ranks import StoppedWithPeer

    stopped, reason = StoppedWithPeer("learner rank 0", "stopped"), LearnerError("trajectory 1", "bad")
    died = ActorDiedError()
    assert first_cause([(0, stopped), (1, reason)]) is reason
    assert first_cause([(0, ConnectionError("closed")), (1, reason)]) is reason
    assert str(first_cause([(0, reason), (1, died)])) == "learner-1: its process died"
    assert isinstance(first_cause([(0, stopped), (1, died)]), LearnerDied)
    assert str(first_cause([(0, ConnectionError("lost\nclosed by peer")), (1, stopped)])) == "learner-0: closed by peer"


@pytest.mark.ray
async def test_a_deadline_error_names_the_step(trained: Trained) -> None:
    group = trained.groups[1]
    group._config = group._config.model_copy(update={"step_timeout_s": 0.001})
    with pytest.raises(DeadlineExceeded, match=r"waited 0\.001 s for 1 learners to finish step 4"):
        await group.step(4, groups_of(4))


@pytest.mark.ray
async def test_start_names_a_missing_model(start: Start, tmp_path: Path) -> None:
    for num_learners in (0, 1):
        with pytest.raises(InputError, match=r"missing: no model folder \(it has no config\.json\)"):
            await start(num_learners, path=tmp_path / "missing")


@pytest.mark.ray
async def test_steps_out_of_order_and_too_few_groups_are_refused(start: Start) -> None:
    group = await start(0)
    with pytest.raises(LearnerError, match="step 2 was asked for, but the next one is 1"):
        await group.step(2, groups_of(2))
    from learner.ppo.shares import split

    with pytest.raises(LearnerError, match="1 groups are too few for 2 learners"):
        split([[make_trajectory(0), make_trajectory(1)]], 2)


def test_ranks_get_whole_groups_of_similar_cost() -> None:
    from learner.ppo.shares import split

    groups = [[replace(make_trajectory(0), group=g) for _ in range(size)] for g, size in enumerate([2, 1, 3, 2, 1])]
    shares = split(groups, 2)
    assert [[t.group for t in share.trajectories] for share in shares] == [[1, 2, 2, 2, 4], [0, 0, 3, 3]]
    assert [share.places for share in shares] == [[2, 3, 4, 5, 8], [0, 1, 6, 7]]
    assert {share.num_total for share in shares} == {9}


def test_the_private_names_of_rllib_that_are_used_exist() -> None:
    from ray.rllib.algorithms.ppo.torch.ppo_torch_learner import PPOTorchLearner
    from ray.rllib.core.learner.learner_group import LearnerGroup
    from ray.rllib.utils.actor_manager import CallResult, FaultTolerantActorManager

    for name in ("update", "is_local"):
        assert hasattr(LearnerGroup, name)
    for name in ("_workers", "_worker_manager", "_learner"):
        assert name in LearnerGroup.__init__.__code__.co_names
    calls = inspect.signature(FaultTolerantActorManager.foreach_actor_async).parameters
    assert list(calls)[1] == "func"
    assert "kwargs" in calls
    assert "timeout_seconds" in inspect.signature(FaultTolerantActorManager.fetch_ready_async_reqs).parameters
    assert {"actor_id", "ok", "get"} <= {*dir(CallResult), *CallResult.__dataclass_fields__}
    for name in ("_make_modules_ddp_if_necessary", "configure_optimizers_for_module", "register_optimizer"):
        assert hasattr(PPOTorchLearner, name)
