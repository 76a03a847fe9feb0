"""`python -m benchmarks [NAME...]`: measure, print a table, write `benchmarks/results/NAME.json`."""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import ray
import typer
from rich.console import Console
from rich.table import Table

from benchmarks import overlap, rollout_actor, task_runs, trl
from benchmarks.letters import make_task
from benchmarks.results import Row, write

app = typer.Typer(add_completion=False)


def speed(folder: Path) -> list[Row]:
    """The rollout actor's engine and the overlap, in one Ray."""
    ray.init("local", num_cpus=8, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        rows = asyncio.run(rollout_actor.measure(folder))
        model, _ = make_task(folder)
        return rows + asyncio.run(overlap.measure(str(model)))
    finally:
        ray.shutdown()


BENCHMARKS: dict[str, tuple[str, Callable[[Path], list[Row]]]] = {
    "speed": ("What the system costs over its bare parts", speed),
    "reviews": ("The reviews demo, three seeds", task_runs.reviews),
    "letters": ("The letters curve, three seeds", task_runs.letters),
    "trl": ("Letters against TRL 1.12.0", trl.measure),
}


@app.command()
def main(names: list[str] = typer.Argument(None, help=f"Of {', '.join(BENCHMARKS)}; all by default.")) -> None:
    """Measure and write what the README shows."""
    sys.path.insert(0, os.getcwd())
    for name in names or list(BENCHMARKS):
        title, measure = BENCHMARKS[name]
        with tempfile.TemporaryDirectory() as folder:
            rows = measure(Path(folder))
        path = write(name, title, rows, command=f"python -m benchmarks {name}")
        _show(title, rows)
        print(path)


def _show(title: str, rows: list[Row]) -> None:
    table = Table("figure", "measured", "aim", title=title)
    for row in rows:
        table.add_row(row.figure, row.measured(), row.aim)
    Console().print(table)


if __name__ == "__main__":
    app()
