"""`antiphon token`: list, add and revoke access tokens of a run's reward service and labelling page."""

from __future__ import annotations

from typing import Annotated

import typer

from deploy.commands.arguments import Run
from deploy.run.open import read_target
from reward_service.http.tokens import add_token, read_tokens, revoke_token, with_tokens


def token(
    run: Run,
    add: Annotated[
        str | None, typer.Option(metavar="NAME", help="Create a token and print it; it is not shown again.")
    ] = None,
    revoke: Annotated[str | None, typer.Option(metavar="NAME", help="Reject this token from now on.")] = None,
) -> None:
    """List, add or revoke the named access tokens of a run's reward service and labelling page.

    [dim]antiphon token runs/reviews --add ana[/dim]
    """
    config, path = read_target(run, ())
    tokens = with_tokens(config.reward_service, path).http.tokens
    assert tokens is not None
    if add is not None:
        print(add_token(tokens, add))
    if revoke is not None:
        revoke_token(tokens, revoke)
    if add is None and revoke is None:
        print("\n".join(read_tokens(tokens)) or "no tokens")
