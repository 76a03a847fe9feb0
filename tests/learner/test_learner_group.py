"""The group on a real Ray: the same weights on none, one or two remote learners, exact resume, and loud failures."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cluster.errors import DeadlineExceeded, InputError, LearnerError
from cluster.trajectory import Trajectory
from cluster.weights import Manifest
from cluster.weights_object_store import fetch_tensors
from learner.config import LearnerConfig
from tests.learner.conftest import make_trajectory, make_two_turn_trajectory

pytestmark = pytest.mark.ray

CONFIG = LearnerConfig(
    num_learners=0, num_epochs=2, num_minibatches=2, learning_rate=1e-3, critic="separate", num_cpus=0.1
)
PROBE = ((1, 2, 3, 4), (5, 6))


@pytest.fixture
async def start(ray_session: None, policy_path: Path) -> Any:
    """`start(num_learners, **options)`: a group that is shut down after the test."""
    from learner.learner_group import PPOLearnerGroup

    groups = []

    async def start(num_learners: int, *, path: Path = policy_path, changes: dict[str, Any] | None = None, **kw: Any):
        config = CONFIG.model_copy(update={"num_learners": num_learners, **(changes or {})})
        options = {"model_path": path, "reference_path": policy_path, "temperature": 0.7, "probe_token_ids": PROBE}
        groups.append(await PPOLearnerGroup.start(config, **(options | kw)))
        return groups[-1]

    yield start
    await asyncio.gather(*(group.shutdown() for group in groups))


def groups_of(step: int, num: int = 8) -> list[list[Trajectory]]:
    """Half of them sampled one version late where there was one."""
    plain = [make_trajectory(i, version=max(0, step - 1 - i % 2), seed=step) for i in range(num - 1)]
    plain.append(make_two_turn_trajectory(num - 1, version=max(0, step - 2) if step > 1 else -1, seed=step))
    return [plain[i : i + 2] for i in range(0, num, 2)]


def tensors(manifest: Manifest) -> dict[str, Tensor]:
    return fetch_tensors(manifest, timeout_s=30)


def checksums(manifest: Manifest) -> list[str]:
    return [entry.checksum for entry in manifest.tensors]


async def steps(group: Any, numbers: range) -> Any:
    for number in numbers:
        result = await group.step(number, groups_of(number))
    return result


Start = Callable[..., Awaitable[Any]]


async def test_none_and_one_remote_learner_agree_bit_for_bit_and_two_to_5e_7(start: Start) -> None:
    local, one, two = await start(0), await start(1), await start(2)
    results = [await steps(group, range(1, 4)) for group in (local, one, two)]
    assert checksums(results[0].manifest) == checksums(results[1].manifest)
    assert results[0].manifest.probe == results[1].manifest.probe
    weights, sharded = tensors(results[0].manifest), tensors(results[2].manifest)
    for name, tensor in weights.items():
        assert float((tensor - sharded[name]).norm() / tensor.norm()) < 5e-7, name
    timeless = [{k: v for k, v in r.metrics.items() if k != "learner/step_s"} for r in results]
    assert timeless[0] == timeless[1]
    assert timeless[2] == pytest.approx(timeless[0], rel=1e-4, abs=1e-5)
    assert results[0].num_optimizer_steps == 4

    trajectories = [trajectory for group in groups_of(4) for trajectory in group]
    kl = [await group.reference_kl(trajectories) for group in (local, two)]
    assert kl[0] == pytest.approx(kl[1], abs=1e-5)
    assert len(kl[0]) == 8


async def test_a_manifest_carries_a_whole_version_with_both_probes(start: Start, policy_path: Path) -> None:
    from learner.actor_critic import load_causal_model
    from learner.weight_publisher import probe_logprobs

    group = await start(1, incarnation="run-7")
    first = await group.publish_initial()
    assert (first.version, first.incarnation, first.previous_probe) == (0, "run-7", None)
    model = load_causal_model(policy_path, "float32")
    assert first.probe == probe_logprobs(model, PROBE, torch.device("cpu"))
    second = (await group.step(1, groups_of(1))).manifest
    assert (second.version, second.probe_token_ids, second.previous_probe) == (1, PROBE, first.probe)
    assert second.probe != first.probe
    model.load_state_dict(tensors(second))
    assert second.probe == probe_logprobs(model, PROBE, torch.device("cpu"))


async def test_a_resumed_run_goes_on_bit_for_bit(start: Start, tmp_path: Path) -> None:
    whole = await start(0)
    await steps(whole, range(1, 3))
    await whole.save_checkpoint(tmp_path / "step-2", extra={"position.json": "{}"})
    uninterrupted = await steps(whole, range(3, 5))
    resumed = await start(0, checkpoint_path=tmp_path / "step-2", first_step=3)
    assert (await resumed.publish_initial()).version == 2
    assert checksums((await steps(resumed, range(3, 5))).manifest) == checksums(uninterrupted.manifest)

    await whole.save_checkpoint(tmp_path / "whole")
    await resumed.save_checkpoint(tmp_path / "resumed")
    states = [(tmp_path / name / "state-00000.safetensors").read_bytes() for name in ("whole", "resumed")]
    assert states[0] == states[1]
    assert (tmp_path / "step-2" / "position.json").exists()
    await whole.save_policy(tmp_path / "policy")
    assert (tmp_path / "policy" / "tokenizer.json").exists()


async def test_a_checkpoint_of_another_version_than_the_first_step_needs_is_refused(
    start: Start, tmp_path: Path
) -> None:
    group = await start(0)
    await steps(group, range(1, 2))
    await group.save_checkpoint(tmp_path / "step-1")
    with pytest.raises(InputError, match="holds version 1, but step 5 starts from 4"):
        await start(0, checkpoint_path=tmp_path / "step-1", first_step=5)


async def test_an_error_on_one_rank_ends_the_step_on_all_and_names_the_trajectory(start: Start) -> None:
    group = await start(2)
    groups = groups_of(1)
    groups[3][0] = replace(groups[3][0], reward=float("nan"))
    started = time.monotonic()
    with pytest.raises(LearnerError, match="trajectory 1-6-0: its reward is nan"):
        await group.step(1, groups)
    assert time.monotonic() - started < 20
    with pytest.raises(LearnerError, match="it has ended: trajectory 1-6-0: its reward is nan"):
        await group.step(1, groups_of(1))


async def test_a_killed_learner_is_an_error_within_seconds_not_a_hang(start: Start) -> None:
    group = await start(2, changes={"num_epochs": 2000})
    process_id = (await asyncio.to_thread(group._group.call, "process_id", [{}, {}]))[1]
    stepping = asyncio.create_task(group.step(1, groups_of(1)))
    await asyncio.sleep(1.5)
    os.kill(process_id, signal.SIGKILL)
    killed = time.monotonic()
    with pytest.raises(LearnerError, match="learner-1: its process died"):
        await stepping
    assert time.monotonic() - killed < 20


async def test_a_step_that_takes_too_long_names_what_was_waited_for(start: Start) -> None:
    group = await start(1, changes={"num_epochs": 2000, "step_timeout_s": 1.0})
    with pytest.raises(DeadlineExceeded, match="waited 1 s for 1 learners to finish step 1"):
        await group.step(1, groups_of(1))


async def test_a_model_that_is_not_there_fails_the_start_by_name(start: Start, tmp_path: Path) -> None:
    for num_learners in (0, 1):
        with pytest.raises(InputError, match=r"missing: no model folder \(it has no config\.json\)"):
            await start(num_learners, path=tmp_path / "missing")


async def test_steps_out_of_turn_and_too_few_trajectories_are_refused(start: Start) -> None:
    group = await start(0)
    with pytest.raises(LearnerError, match="step 2 was asked for, but the next one is 1"):
        await group.step(2, groups_of(2))
    from learner.learner_group import split

    with pytest.raises(LearnerError, match="1 trajectories are too few for 2 learners"):
        split([make_trajectory(0)], 2)
    assert [len(share.trajectories) for share in split([make_trajectory(i) for i in range(7)], 3)] == [2, 2, 3]


def test_the_private_names_of_rllib_that_are_used_exist() -> None:
    from ray.rllib.algorithms.ppo.torch.ppo_torch_learner import PPOTorchLearner
    from ray.rllib.core.learner.learner_group import LearnerGroup

    for name in ("_get_results", "update", "shutdown", "is_local"):
        assert hasattr(LearnerGroup, name)
    for name in ("_make_modules_ddp_if_necessary", "configure_optimizers_for_module", "register_optimizer"):
        assert hasattr(PPOTorchLearner, name)
