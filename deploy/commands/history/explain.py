"""`antiphon explain`: the command-line options; `explanation` computes what is shown."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deploy.commands.arguments import Run
from deploy.run.open import require_run


def explain(
    run: Run,
    uid: Annotated[str, typer.Argument(metavar="UID", help="A trained conversation; antiphon inspect lists them.")],
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write an HTML page.")] = None,
) -> None:
    """Show one conversation turn by turn: text, rewards, and value, advantage and update of every token.

    Trains the step again from the nearest checkpoint, in this process, to get the values and advantages of training.

    [dim]antiphon explain runs/reviews 0-88-0 --html why.html[/dim]
    """
    directory = require_run(run)
    from deploy.commands.history.explanation import explain_conversation

    explain_conversation(directory, uid, html=html)
