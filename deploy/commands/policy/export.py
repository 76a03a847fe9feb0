"""`antiphon export`: copy a run's policy or reward model as a Hugging Face model folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Annotated

import typer

from cluster.errors import InputError
from cluster.files import replacing_folder
from deploy.commands.policy.selection import Best, RunOrModel, Step, selected_policy
from deploy.run.artifacts import STAGE_OF_FOLDER, is_model_folder
from deploy.run.directory import RunDirectory
from deploy.run.open import require_run
from deploy.run.stages import not_done


def export(
    run: RunOrModel,
    output: Annotated[Path, typer.Option(metavar="DIR", help="Folder to create; it must not exist.")],
    step: Step = None,
    best: Best = False,
    reward_model: Annotated[
        bool, typer.Option("--reward-model", help="Copy the reward model instead of the policy.")
    ] = False,
) -> None:
    """Copy the newest policy of a run, or its reward model, into a new Hugging Face model folder.

    A run that trained nothing but a reward model exports that.

    [dim]antiphon export runs/reviews --output my-model[/dim]
    """
    if output.exists():
        raise InputError(str(output), "already exists; choose another --output")
    if reward_model or _has_only_a_reward_model(run):
        if step is not None or best:
            raise InputError("--reward-model", "has no steps: leave out --step and --best")
        source, origin = require_run(run).path / "reward_model", "the reward model"
        if not (source / "config.json").is_file():
            raise not_done("reward_model")
        _copy(source, output, origin)
        return
    with selected_policy(run, step=step, best=best) as policy:
        _copy(policy.folder, output, policy.origin)


def _has_only_a_reward_model(path: Path) -> bool:
    """Return whether the run has trained a reward model and no policy."""
    if is_model_folder(path):
        return False
    is_begun = RunDirectory(path).newest_checkpoint("ppo") is not None
    trained = is_begun or any((path / folder).exists() for folder in STAGE_OF_FOLDER)
    return not trained and (path / "reward_model" / "config.json").is_file()


def _copy(source: Path, output: Path, origin: str) -> None:
    try:
        with replacing_folder(output) as partial:
            shutil.copytree(source, partial, dirs_exist_ok=True)
    except OSError as error:
        raise InputError(str(output), f"cannot be written ({error.strerror or error})") from error
    size = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
    model = json.loads((output / "config.json").read_text())
    name = (model.get("architectures") or ["model"])[0]
    print(f"{output}: {name}, {size / 2**20:.1f} MiB ({origin})")
