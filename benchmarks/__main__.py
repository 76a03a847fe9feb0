"""`python -m benchmarks [NAME...]`: measure, print a table, write `benchmarks/results/NAME.json`."""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import ray
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.gpu import engine
from benchmarks.gpu import learner as learner_gpu
from benchmarks.parts import (
    learner,
    learner_step,
    many_prompts,
    overlap,
    recorder,
    reward_http,
    rollout_actor,
    whole_run,
)
from benchmarks.peer import trl
from benchmarks.results import Row, write
from benchmarks.scale import measure as scale
from benchmarks.tasks import chat, environments, estimators, lag_study, runs, start_up
from benchmarks.tasks.letters import make_task

app = typer.Typer(add_completion=False)


def speed(folder: Path) -> list[Row]:
    """Measure the rollout actor, the learner's step and the overlap with stand-ins, in one Ray."""
    model, rows = make_task(folder)
    ray.init("local", num_cpus=8, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        return (
            asyncio.run(rollout_actor.measure(model, rows))
            + asyncio.run(learner_step.measure(model))
            + asyncio.run(overlap.measure())
        )
    finally:
        ray.shutdown()


BENCHMARKS: dict[str, tuple[str, tuple[int, ...], Callable[[Path], list[Row]]]] = {
    "reviews": ("The reviews demo", runs.SEEDS, runs.reviews),
    "reviews_dpo": ("Reviews by DPO", runs.SEEDS, runs.reviews_dpo),
    "letters": ("The letters curve", runs.SEEDS, runs.letters),
    "speed": ("What the system costs over its bare parts", (0,), speed),
    "whole_run": ("The whole letters run over its bare parts", tuple(range(whole_run.REPEATS)), whole_run.measure),
    "start_up": ("From the command to the first PPO step", (0,), start_up.measure),
    "many_prompts": ("200,000 prompts", (0,), many_prompts.measure),
    "trl": ("Letters against TRL 1.12.0", tuple(range(trl.REPEATS)), trl.measure),
    "learner": ("The learner's machinery", (0,), learner.measure),
    "learner_gpu": ("The learner on a GPU", (0,), learner_gpu.measure),
    "engine_gpu": ("The engine on a GPU", (0,), engine.measure),
    "estimators": ("Letters without a critic", runs.SEEDS, estimators.measure),
    "reward_http": ("Scores over HTTP", (0,), reward_http.measure),
    "recorder": ("What recording costs", tuple(range(recorder.REPEATS)), recorder.measure),
    "scale": ("1 to 256 rollout actors", (0,), scale.measure),
    **{name: (title, runs.SEEDS, measure) for name, (title, measure) in chat.TASKS.items()},
    "environments": ("What conversations cost", (0,), environments.measure),
    "lag_study": ("What lag costs", runs.SEEDS, lag_study.measure),
}


@app.command()
def main(
    names: list[str] = typer.Argument(None, help=f"Benchmarks: {', '.join(BENCHMARKS)}. All by default."),
    keep: Path | None = typer.Option(None, help="Folder to keep the runs in; by default they are deleted."),
) -> None:
    """Measure benchmarks, print their tables and write the results that the README shows."""
    sys.path.insert(0, os.getcwd())
    for name in names or list(BENCHMARKS):
        if name not in BENCHMARKS:
            raise typer.BadParameter(f"no benchmark {name}; use one of {', '.join(BENCHMARKS)}")
    for name in names or list(BENCHMARKS):
        title, seeds, measure = BENCHMARKS[name]
        with tempfile.TemporaryDirectory() if keep is None else nullcontext(str(keep)) as folder:
            rows = measure(Path(folder))
        if not rows:
            continue
        path = write(name, title, rows, command=f"python -m benchmarks {name}", seeds=seeds)
        _show(title, rows)
        print(path)


def _show(title: str, rows: list[Row]) -> None:
    table = Table("figure", "measured", "aim", title=title)
    for row in rows:
        table.add_row(row.figure, row.measured(), row.aim)
    Console().print(table)


if __name__ == "__main__":
    app()
