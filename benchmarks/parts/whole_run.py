"""Compare the whole letters run at steady state with its bare parts, each alone on the machine.

The order is bare parts, run, bare parts; the parts' rates are the means of before and after, which cancels a drift of
the machine's speed. The same runs give the real overlap of sampling and learning.
"""

from __future__ import annotations

import asyncio
import itertools
import statistics
from pathlib import Path
from typing import Any

import ray

from benchmarks.parts.bare_loop import BareLoop
from benchmarks.parts.learner_step import batch
from benchmarks.parts.rollout_actor import PlainEngine
from benchmarks.results import Row
from benchmarks.tasks.letters import ONE_THREAD, letters_config, make_task
from benchmarks.tasks.runs import Finished, train
from cluster.actors.remote import kill_actor, start_actor

REPEATS, NUM_STEPS, NUM_SETTLING = 3, 50, 10
NUM_BARE_STEPS, NUM_BARE_PROMPTS = 10, 2560


def measure(folder: Path) -> list[Row]:
    """Measure ratios, rates and overlap of `REPEATS` runs."""
    model, rows = make_task(folder)
    prompts = [row["prompt"] for row in rows][:NUM_BARE_PROMPTS]
    bare, runs = [_bare(model, prompts)], []
    for repeat in range(REPEATS):
        lines = (ONE_THREAD, f"learner.num_steps = {NUM_STEPS}", "evaluation.every_steps = 1000")
        runs.append(train("letters", folder, f"whole-{repeat}", *lines, f"run.seed = {repeat}"))
        bare.append(_bare(model, prompts))
    rates = [_episodes_per_s(run) for run in runs]
    around = list(itertools.pairwise(bare))
    learner, engine = (tuple((a[part] + b[part]) / 2 for a, b in around) for part in (0, 1))
    slower = [min(pair) for pair in zip(learner, engine, strict=True)]
    return [
        Row("whole letters run over the slower bare part", _ratios(rates, slower), "", ">= 0.9"),
        Row("whole letters run", tuple(rates), "episodes/s"),
        Row("bare torch loop alone", learner, "episodes/s"),
        Row("plain LLM.generate alone", engine, "episodes/s"),
        Row("real overlap: longer phase / step time", tuple(map(_overlap, runs)), "", "beside the stand-ins'"),
    ]


def _bare(model: Path, prompts: list[str]) -> tuple[float, float]:
    """Return episodes/s of the bare learner and of the bare engine, measured one after the other."""
    ray.init("local", num_cpus=8, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        return asyncio.run(_bare_rates(str(model), prompts))
    finally:
        ray.shutdown()


async def _bare_rates(model: str, prompts: list[str]) -> tuple[float, float]:
    settings = letters_config(num_steps=NUM_STEPS, max_policy_lag=0)
    num_episodes = settings.trajectory_queue.groups_per_step
    loop = start_actor(BareLoop, model, settings.learner, name="bare")
    seconds = [await loop.step_s(batch(step, num_episodes)) for step in range(1, NUM_BARE_STEPS + 1)]
    kill_actor(loop)
    plain = start_actor(PlainEngine, name="plain")
    await plain.start(model, settings.rollout_actors.num_concurrent_groups)
    max_tokens = settings.rollout_actors.max_response_tokens
    await plain.tokens_per_s(prompts[:num_episodes], max_tokens)
    tokens_per_s = await plain.tokens_per_s(prompts, max_tokens)
    kill_actor(plain)
    return num_episodes / statistics.median(seconds), tokens_per_s / max_tokens


def _steady(run: Finished) -> list[dict[str, Any]]:
    """Return the steps without the first ones and the last two, during which nothing is sampled."""
    return run.steps[NUM_SETTLING:-2]


def _episodes_per_s(run: Finished) -> float:
    first, *_, last = _steady(run)
    return float((last["num_episodes"] - first["num_episodes"]) / (last["time_s"] - first["time_s"]))


def _overlap(run: Finished) -> float:
    """Return the median over steps of the longer of engine and learner time, over the time from step to step."""
    ratios: list[float] = []
    for before, after in itertools.pairwise(_steady(run)):
        sampling_s = sum(after[key] - before[key] for key in ("rollout_actors/busy_s", "rollout_actors/swap_s"))
        ratios.append(max(sampling_s, after["learner/step_s"]) / (after["time_s"] - before["time_s"]))
    return statistics.median(ratios)


def _ratios(numerators: list[float], denominators: list[float]) -> tuple[float, ...]:
    return tuple(a / b for a, b in zip(numerators, denominators, strict=True))
