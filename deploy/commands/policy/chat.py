"""`antiphon chat`: the command-line options; `chat_session` answers the prompts."""

from __future__ import annotations

from typing import Annotated

import typer

from deploy.commands.arguments import Run
from deploy.run.open import require_run


def chat(
    run: Run, prompt: Annotated[str | None, typer.Option(help="Answer this prompt only. Default: read stdin.")] = None
) -> None:
    """Talk to the newest policy of a run as it was trained: in one conversation, or with a separate prompt per line.

    [dim]antiphon chat runs/reviews --prompt 'the food'[/dim]
    """
    directory = require_run(run)
    from deploy.commands.policy.chat_session import answer_prompts

    answer_prompts(directory, prompt)
