"""`antiphon new`: create a task of the user's own from an example task."""

from __future__ import annotations

import importlib.util
import keyword
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from cluster.errors import InputError
from cluster.files import replacing_folder
from deploy.commands.setup.templates import RUN_FILE, copied_task, task_names


def new(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder to create; it must not exist.")],
    from_: Annotated[
        str,
        typer.Option(
            "--from", metavar="TASK", help="Example task to copy, such as reviews.", autocompletion=lambda: task_names()
        ),
    ],
) -> None:
    """Create a task of your own in FOLDER from an example task, and print the commands to run it.

    FOLDER becomes a Python package: its run file names its functions as FOLDER.module:function.

    [dim]antiphon new my_task --from reviews[/dim]
    """
    root, package = _package(folder)
    files = copied_task(from_, package)
    _write(folder, files)
    print(f"created {folder} from {from_}: {', '.join(sorted(files))}\n\nNext:")
    if root != Path.cwd():
        print(f"  cd {root}")
    run_file = Path(*package.split("."), RUN_FILE)
    print(f"  antiphon check {run_file}\n  antiphon train {run_file}")


def _package(folder: Path) -> tuple[Path, str]:
    """Return the folder to run commands in, and the dotted name of the package `folder` from there.

    Raises InputError if the folder exists, or if its name cannot be imported or is already taken.
    """
    path = Path(os.path.abspath(folder))
    if path.exists():
        raise InputError(str(folder), "already exists; choose another folder")
    root = Path.cwd() if path.is_relative_to(Path.cwd()) else path.parent
    parts = path.relative_to(root).parts
    for part in parts:
        if not part.isidentifier() or keyword.iskeyword(part):
            raise InputError(str(folder), f"{part!r} cannot be a Python module; use letters, digits and underscores")
    if not (root / parts[0]).exists() and _is_taken(parts[0], root):
        raise InputError(str(folder), f"{parts[0]!r} is the name of an installed Python module; choose another name")
    return root, ".".join(parts)


def _is_taken(name: str, root: Path) -> bool:
    if name in sys.stdlib_module_names:
        return True
    spec = importlib.util.find_spec(name)
    return spec is not None and (spec.origin is None or Path(spec.origin).parent.parent != root)


def _write(folder: Path, files: dict[str, str]) -> None:
    """Write the files into the new folder, all or none. Raises InputError if it cannot be written."""
    try:
        with replacing_folder(folder) as partial:
            for path, text in files.items():
                (partial / path).parent.mkdir(parents=True, exist_ok=True)
                (partial / path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(str(folder), f"cannot be written ({error.strerror or error})") from error
