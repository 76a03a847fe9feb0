"""Arguments and options that several commands share."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

Target = Annotated[Path, typer.Argument(metavar="TARGET", help="A run file (RUN.toml) or a run directory.")]
RunFile = Annotated[Path, typer.Argument(metavar="RUN.toml", help="A run file.")]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")]
Lines = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="LINE", help="Override a setting with a line of TOML: 'learner.clip = 0.1'. Repeatable."
    ),
]
RunsDir = Annotated[Path | None, typer.Option(help="Folder of the run directories.", show_default="runs")]
Name = Annotated[str | None, typer.Option(help="Name of the run.", show_default="the run file's folder")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Delete the results of the run and start over.")]
AllowChanges = Annotated[
    bool,
    typer.Option(
        "--allow-changes", help="Resume with other settings; those that matter are recorded from the next step on."
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the resolved run file and exit.")]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """Options of every command that starts or continues a run; a new field is a new option of each."""

    set_: Lines = None
    runs_dir: RunsDir = None
    name: Name = None
    fresh: Fresh = False
    allow_changes: AllowChanges = False
    dry_run: DryRun = False


def with_run_options(command: Callable[..., None]) -> Callable[..., None]:
    """Replace a command's parameter `options: RunOptions` by one command-line option for each field."""
    hints = get_type_hints(RunOptions, include_extras=True)

    @functools.wraps(command)
    def wrapper(**arguments: Any) -> None:
        options = RunOptions(**{name: arguments.pop(name) for name in hints})
        command(**arguments, options=options)

    own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != "options"]
    shared = [
        inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=hints[f.name])
        for f in fields(RunOptions)
    ]
    parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own] + shared
    wrapper.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {p.name: p.annotation for p in parameters}
    return wrapper
