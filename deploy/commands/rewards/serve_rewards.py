"""`antiphon serve-rewards`: the command-line options; `standalone_service` runs the service."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from deploy.commands.arguments import Lines, Name, RunsDir, Target
from deploy.config.schema import RunConfig
from deploy.run.directory import RunDirectory
from deploy.run.open import changed_inputs, read_target
from deploy.run.reward_models import published_folder
from deploy.run.stages import not_done
from reward_service.http.address import require_token
from reward_service.http.tokens import with_tokens


def serve_rewards(
    target: Target,
    host: Annotated[
        str, typer.Option(help="Address to listen on. Beyond loopback, ANTIPHON_TOKEN must be set.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8000,
    set_: Lines = None,
    runs_dir: RunsDir = None,
    name: Name = None,
) -> None:
    """Serve the rewards of a run over HTTP; prints "listening on URL" when ready.

    [dim]curl -d '{"prompts": ["..."], "responses": ["..."]}' http://127.0.0.1:8000/v1/rewards[/dim]

    [dim]antiphon serve-rewards runs/reviews[/dim]
    """
    config, path = read_target(target, set_ or (), name=name, runs_dir=runs_dir)
    service = with_tokens(config.served(), path).model_copy(update={"host": host})
    require_token(service, os.environ.get("ANTIPHON_TOKEN"), "--host")
    reward_model = _reward_model(config, path)
    for changed in changed_inputs(config, RunDirectory(path)):
        if changed.input.rescores and changed.input.key.startswith(("reward_service.", "tasks.")):
            print(f"changed since the run's last command: {changed}; rewards are those of now", file=sys.stderr)
    from deploy.commands.rewards.standalone_service import serve
    from deploy.run.artifacts import feedback_settings

    serve(
        config.served(),
        reward_model_path=reward_model,
        host=host,
        port=port,
        name=config.run.name,
        run_path=path,
        feedback=feedback_settings(config, RunDirectory(path)),
    )


def _reward_model(config: RunConfig, path: Path) -> Path | None:
    """Return the published reward model if the service needs one. Raises InputError if none is published."""
    if not config.served().needs_reward_model():
        return None
    folder = published_folder(path)
    if folder is None:
        raise not_done("reward_model")
    return folder
