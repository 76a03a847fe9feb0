"""A supervised stage on a real Ray: two learners match one rank, and an error names a dead one."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from cluster.data.datasets import Source
from cluster.errors import InputError, LearnerDied
from learner.config import LearnerConfig, stage_threads
from tests.learner.conftest import rank_process_ids
from tests.learner.ppo.test_rllib import largest_difference
from tests.support.supervised_ranks import settings, stream, untimed, write_inputs

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("group"))


@pytest.mark.slow
async def test_two_learners_match_one_rank_and_a_dead_one_is_named(
    ray_session: None, folder: Path, tmp_path: Path
) -> None:
    from learner.supervised.group import SupervisedLearnerGroup

    alone = settings(folder, "reward_model", tmp_path / "alone")
    expected = untimed(list(stream(alone)))
    rank_settings = settings(folder, "reward_model", tmp_path / "group", num_learners=2, num_cpus=0.1)
    group = await SupervisedLearnerGroup.start(rank_settings)
    try:
        rows = untimed([row async for row in group.train()])
        assert [row.get("step") for row in rows] == [row.get("step") for row in expected]
        for row, wanted in zip(rows, expected, strict=True):
            assert row == pytest.approx(wanted, rel=1e-4)
        weights = [load_file(place.output_path / "model.safetensors") for place in (alone, rank_settings)]
        assert largest_difference(*weights) < 3e-5  # Adam amplifies the rounding of float32 sums
        os.kill((await rank_process_ids(group))[1], signal.SIGKILL)
        with pytest.raises(LearnerDied, match="learner-1: its process died"):
            await group.call_rank("advance", 1)
    finally:
        await group.shutdown()


async def test_start_raises_the_error_of_wrong_data(ray_session: None, folder: Path, tmp_path: Path) -> None:
    from learner.supervised.group import SupervisedLearnerGroup

    rank_settings = replace(settings(folder, "sft", tmp_path, num_cpus=0.1), sources=(Source(folder / "none.parquet"),))
    with pytest.raises(InputError, match=r"none\.parquet: no such data set"):
        await SupervisedLearnerGroup.start(rank_settings)


def test_a_call_takes_half_a_second_and_at_most_doubles_its_steps() -> None:
    from learner.supervised.group import _next_num

    assert _next_num(1, 0.001) == 2
    assert _next_num(8, 0.4) == 10
    assert _next_num(8, 40.0) == 1


def test_learners_divide_all_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("learner.config.num_cores", lambda: 8)
    assert [stage_threads(LearnerConfig(num_learners=num)) for num in (0, 1, 2, 16)] == [8, 8, 4, 1]
    assert stage_threads(LearnerConfig(num_threads=3)) == 3
