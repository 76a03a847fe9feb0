"""`antiphon export`: copy a run's policy as a Hugging Face model folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Annotated

import typer

from cluster.errors import InputError
from cluster.files import replacing_folder
from deploy.commands.arguments import Run
from deploy.run.open import require_run
from deploy.run.stages import not_done


def export(
    run: Run, output: Annotated[Path, typer.Option(metavar="DIR", help="Folder to create; it must not exist.")]
) -> None:
    """Copy the policy of a run into a new Hugging Face model folder.

    [dim]antiphon export runs/reviews --output my-model[/dim]
    """
    policy = require_run(run).path / "policy"
    if not (policy / "config.json").exists():
        raise not_done("ppo")
    if output.exists():
        raise InputError(str(output), "already exists; choose another --output")
    try:
        with replacing_folder(output) as partial:
            shutil.copytree(policy, partial, dirs_exist_ok=True)
    except OSError as error:
        raise InputError(str(output), f"cannot be written ({error.strerror or error})") from error
    size = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
    model = json.loads((output / "config.json").read_text())
    print(f"{output}: {(model.get('architectures') or ['model'])[0]}, {size / 2**20:.1f} MiB")
