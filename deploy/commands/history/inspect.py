"""`antiphon inspect`: list the trajectories in a file, or show one of them completely.

Reads the file and, if it is in a run directory, the run's tokenizer. Imports neither torch nor ray.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cluster.errors import InputError
from cluster.hub.download import local_model
from cluster.trajectory import Trajectory, read_trajectories
from deploy.config.load import read_run_config
from deploy.run.layout import CONFIG
from deploy.terminal.text import number, visible

COLUMNS = ("uid", "task", "group", "reward", "tokens", "versions", "finish", "min logprob", "max logprob", "not finite")
PLAIN_WIDTH = 120
Decode = Callable[[Sequence[int]], str]


def inspect(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A file in RUN/trajectories or RUN/failed.")],
    uid: Annotated[str | None, typer.Option(help="Show this trajectory completely.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="How many trajectories to list.")] = 20,
) -> None:
    """List the trajectories in a file and mark values that are not finite.

    [dim]antiphon inspect runs/reviews/trajectories/step-000012.arrow --uid 0-88-0[/dim]
    """
    show_trajectories(file, uid=uid, limit=limit)


def show_trajectories(path: Path, *, uid: str | None, limit: int) -> None:
    """Print a table of the first `limit` trajectories, or the one with this uid.

    Raises InputError if there is none.
    """
    trajectories = read_trajectories(path)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else PLAIN_WIDTH)
    if uid is None:
        _print_all(console, trajectories, limit)
        return
    found = next((trajectory for trajectory in trajectories if trajectory.uid == uid), None)
    if found is None:
        raise InputError("--uid", f"no trajectory {uid} in {path}")
    _print_one(console, found, decoder(path.absolute().parent.parent))


def not_finite(trajectory: Trajectory) -> list[str]:
    """Return the names of the values of a trajectory that are NaN or infinite."""
    parts: dict[str, Sequence[float | None]] = {
        "reward": [trajectory.reward],
        "turn reward": [turn.reward for turn in trajectory.turns],
        "logprob": trajectory.behavior_logprobs,
        **{f"reward part {name}": [value] for name, value in trajectory.reward_parts.items()},
    }
    return [
        name for name, values in parts.items() if not all(math.isfinite(value) for value in values if value is not None)
    ]


def _print_all(console: Console, trajectories: Sequence[Trajectory], limit: int) -> None:
    table = Table(box=box.ROUNDED, header_style="dim")
    for heading in COLUMNS:
        table.add_column(heading, overflow="fold", justify="right" if heading in COLUMNS[2:5] else "left")
    for trajectory in trajectories[:limit]:
        bad = not_finite(trajectory)
        row = [*_cells(trajectory), ", ".join(bad)]
        table.add_row(*(Text(visible(cell)) for cell in row), style="red" if bad else None)
    console.print(table)
    num_bad = sum(bool(not_finite(trajectory)) for trajectory in trajectories)
    marked = f", {num_bad} with values that are not finite" if num_bad else ""
    console.print(f"{min(limit, len(trajectories))} of {len(trajectories)} trajectories{marked}")


def _cells(trajectory: Trajectory) -> Iterator[str]:
    versions = sorted({segment.policy_version for segment in trajectory.segments if segment.length})
    logprobs = [
        logprob for logprob, sampled in zip(trajectory.behavior_logprobs, trajectory.mask, strict=True) if sampled
    ]
    finite = [logprob for logprob in logprobs if math.isfinite(logprob)]
    yield from (trajectory.uid, trajectory.task, str(trajectory.group), number(trajectory.reward, ".4g"))
    yield str(len(trajectory.token_ids))
    yield ", ".join(map(str, versions))
    yield trajectory.finish_reason
    yield from (number(limit(finite, default=None), ".4g") for limit in (min, max))


def _print_one(console: Console, trajectory: Trajectory, decode: Decode) -> None:
    facts = {
        "uid": trajectory.uid,
        "group": trajectory.group,
        "task": trajectory.task,
        "step": trajectory.step,
        "admission index": trajectory.admission_index,
        "finish reason": trajectory.finish_reason,
        "reward": trajectory.reward,
        **{f"reward part {name}": value for name, value in trajectory.reward_parts.items()},
        "scorer version": trajectory.scorer_version,
        "not finite": ", ".join(not_finite(trajectory)) or None,
    }
    _print_table(console, ("", ""), [(name, "" if value is None else value) for name, value in facts.items()])
    segments = [(s.policy_version, s.start, s.length, s.seed, s.actor) for s in trajectory.segments]
    _print_table(console, ("policy version", "start", "length", "seed", "actor"), segments, title="segments")
    turns = [(turn.start, turn.length, "" if turn.reward is None else turn.reward) for turn in trajectory.turns]
    _print_table(console, ("start", "length", "reward"), turns, title="turns")
    for sampled, tokens in groupby(zip(trajectory.mask, trajectory.token_ids, strict=True), key=lambda pair: pair[0]):
        console.print("response" if sampled else "prompt", style="bold")
        console.print(Text(visible(decode([token for _, token in tokens]))), soft_wrap=True)


def _print_table(
    console: Console, headings: Sequence[str], rows: Sequence[Sequence[object]], *, title: str | None = None
) -> None:
    table = Table(*headings, title=title, title_justify="left", box=box.ROUNDED, show_header=any(headings))
    for row in rows:
        table.add_row(*(Text(visible(str(cell))) for cell in row))
    console.print(table)


def decoder(run_path: Path) -> Decode:
    """Return a function that decodes token ids, or joins them if the run has no tokenizer."""
    tokenizer_path = _tokenizer_path(run_path)
    if tokenizer_path is None:
        return lambda token_ids: " ".join(map(str, token_ids))
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_path))

    def decode(token_ids: Sequence[int]) -> str:
        return str(tokenizer.decode(list(token_ids), skip_special_tokens=False))

    return decode


def _tokenizer_path(run_path: Path) -> Path | None:
    if not (run_path / CONFIG).is_file():
        return None
    model = read_run_config(run_path / CONFIG).model.path
    folders = [run_path / "sft", local_model(model, weights=False) if model else run_path / "model"]
    return next((folder / "tokenizer.json" for folder in folders if (folder / "tokenizer.json").is_file()), None)
