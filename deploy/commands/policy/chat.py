"""`antiphon chat`: the command-line options; `chat_session` answers the prompts."""

from __future__ import annotations

from typing import Annotated

import typer

from deploy.commands.policy.selection import Best, RunOrModel, Step, selected_policy


def chat(
    run: RunOrModel,
    prompt: Annotated[str | None, typer.Option(help="Answer this prompt only. Default: read stdin.")] = None,
    step: Step = None,
    best: Best = False,
) -> None:
    """Talk to the newest policy of a run, or to a model folder, as it was trained: in one conversation or line by line.

    [dim]antiphon chat runs/reviews --prompt 'the food'[/dim]
    """
    with selected_policy(run, step=step, best=best) as policy:
        from deploy.commands.policy.chat_session import answer_prompts

        answer_prompts(policy.config, policy.run, policy.folder, prompt)
