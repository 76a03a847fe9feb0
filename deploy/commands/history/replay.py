"""`antiphon replay`: the command-line options; `retraining` trains the recorded steps again."""

from __future__ import annotations

from typing import Annotated

import typer

from deploy.commands.arguments import Run
from deploy.run.open import require_run


def replay(
    run: Run,
    steps: Annotated[
        str | None, typer.Option(metavar="A:B", help="Only these steps, from the checkpoint before them.")
    ] = None,
    tokens: Annotated[bool, typer.Option("--tokens", help="Also sample every segment again.")] = False,
    what_if: Annotated[
        list[str] | None,
        typer.Option(metavar="LINE", help="Train with another learner setting (a line of TOML). Repeatable."),
    ] = None,
) -> None:
    """Train the recorded trajectories again and compare every policy version, bit for bit.

    Fails with exit code 1 and names the first step that differs. With --what-if, prints the new training curves beside
    the recorded ones instead.

    [dim]antiphon replay runs/letters --what-if 'learner.clip = 0.1'[/dim]
    """
    directory = require_run(run)
    from deploy.commands.history.retraining import replay_run

    replay_run(directory, steps=steps, what_if=what_if or (), tokens=tokens)
