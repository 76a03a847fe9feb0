"""Runs from Python: from a running event loop, from a script, and with a loop of one's own."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import InputError
from deploy import api
from tests.support.paths import LETTERS, ROOT


@pytest.fixture
def lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(ROOT)
    return [f"run.runs_dir = {json.dumps(str(tmp_path))}", "learner.num_steps = 2", "evaluation.num_prompts_during = 4"]


def test_a_run_file_is_loaded_with_overrides(lines: list[str], tmp_path: Path) -> None:
    config = api.load(LETTERS, lines)
    assert (config.run.name, config.run.runs_dir, config.learner.num_steps) == ("letters", tmp_path, 2)
    with pytest.raises(InputError, match="no_such"):
        api.load("no_such.toml")


async def test_run_names_its_counterpart_in_a_running_loop(lines: list[str]) -> None:
    with pytest.raises(InputError, match="run_async"):
        api.run(api.load(LETTERS, lines))


async def test_an_unknown_stage_is_refused_before_anything_starts(lines: list[str], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no stage 'orpo'"):
        await api.run_async(api.load(LETTERS, lines), stages=["orpo"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_goes_through_in_a_running_loop_and_is_done_for_a_script(lines: list[str], tmp_path: Path) -> None:
    in_another_process(run_in_a_loop, lines, tmp_path)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_loop_of_ones_own_trains_on_the_actors_and_the_rewards(lines: list[str], tmp_path: Path) -> None:
    in_another_process(run_own_loop, lines, tmp_path)


def in_another_process(function: Callable[[list[str], Path], None], lines: list[str], folder: Path) -> None:
    """Run `function` in a process without the tests' Ray; raises what it raises."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        pool.submit(function, lines, folder).result()


def run_in_a_loop(lines: list[str], folder: Path) -> None:
    config, steps = api.load(LETTERS, lines), list[tuple[str, int]]()

    def on_step(stage: str, metrics: Mapping[str, Any]) -> None:
        steps.append((stage, metrics["step"]))

    async def notebook() -> None:
        directory = await api.run_async(config, stages=["ppo"], on_step=on_step)
        assert (directory.path, directory.status().state) == (folder / "letters", "DONE")

    asyncio.run(notebook())
    assert steps == [("ppo", 1), ("ppo", 2)]
    assert api.run(config, on_step=on_step).summary()["num_trained"] == 16
    assert len(steps) == 2, "a finished run starts nothing"


def run_own_loop(lines: list[str], folder: Path) -> None:
    asyncio.run(own_loop(lines, folder))


async def own_loop(lines: list[str], folder: Path) -> None:
    config, rows, metrics = api.load(LETTERS, lines), [{"prompt": "bcd:"}, {"prompt": "efg:"}], []
    async with api.open_session(config) as session:
        await api.prepare(session)
        policy = api.policy_path(config, session.run.path)
        learners = await api.start_learners(session, None, 1, lengths=((0, 2),))
        await learners.publish_initial()
        for step in (1, 2):
            sampled = await session.answer(rows, policy, task="", num=2, seed=f"step {step}")
            groups = [
                await api.scored_group(session, i, row, group, step=step)
                for i, (row, group) in enumerate(zip(rows, sampled, strict=True))
            ]
            metrics.append((await learners.step(step, groups)).metrics)
            policy = session.run.path / "policies" / f"step-{step}"
            await learners.save_policy(policy)
        await learners.shutdown()
    assert [row["learner/grad_norm"] > 0 for row in metrics] == [True, True]
    assert (folder / "letters" / "policies" / "step-2" / "config.json").exists()
    assert session.run.status().state == "DONE"
