"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Target = Annotated[Path, typer.Argument(metavar="TARGET", help="A run file (RUN.toml) or a run directory.")]
RunFile = Annotated[Path, typer.Argument(metavar="RUN.toml", help="A run file.")]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")]
Lines = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="LINE", help="One more line of TOML: 'learner.learning_rate = 5e-7'. Repeatable."),
]
RunsDir = Annotated[Path | None, typer.Option(help="Folder of the run directories.", show_default="runs")]
Name = Annotated[str | None, typer.Option(help="Name of the run.", show_default="the run file's folder")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Delete what the run has done so far and start over.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the resolved run file and do nothing.")]
