"""Read the shipped example tasks and copy one as a task of the user's own.

An installed package contains the examples as `deploy/templates`; a checkout has them in `examples`.
"""

from __future__ import annotations

import importlib.resources
import re
from collections.abc import Mapping
from importlib.resources.abc import Traversable

from cluster.errors import InputError

RUN_FILE = "run.toml"
SUFFIXES = (".py", ".toml")
PACKAGE = "examples"
_REFERENCE = re.compile(rf"\b{PACKAGE}\.(\w+)")
_IMPORT_FROM_PACKAGE = re.compile(rf"\bfrom {PACKAGE} import (\w+)")
_RUN_NAME = re.compile(r'^name = ".*"$', re.MULTILINE)


def template_folder() -> Traversable:
    """Return the folder that contains the example tasks. Raises InputError if it is missing."""
    package = importlib.resources.files("deploy")
    for folder in (package / "templates", package / ".." / PACKAGE):
        if folder.is_dir():
            return folder
    raise InputError("new", f"the example tasks are missing from the installation of antiphon ({package})")


def task_names() -> list[str]:
    """Return the names of the example tasks."""
    return sorted(folder.name for folder in template_folder().iterdir() if (folder / RUN_FILE).is_file())


def copied_task(task: str, package: str) -> dict[str, str]:
    """Return the files of an example task, by their path in the new folder, as Python `package`.

    The task's modules and the shared modules that it imports become modules of `package`; other tasks that it imports
    become its sub-packages. Raises InputError if there is no such task.
    """
    if task not in task_names():
        raise InputError("--from", f"no example task {task!r}; choose one of {', '.join(task_names())}")
    examples = template_folder()
    files = _read_folder(examples / task)
    pending = _referenced(files) - {task}
    done = {task}
    while pending:
        name = pending.pop()
        done.add(name)
        folder, module = examples / name, f"{name}.py"
        if folder.is_dir():
            added = {f"{name}/{path}": text for path, text in _read_folder(folder).items() if path.endswith(".py")}
        else:
            added = {module: (examples / module).read_text(encoding="utf-8")}
        pending |= _referenced(added) - done
        files |= added
    files[RUN_FILE] = _RUN_NAME.sub(f'name = "{package.rpartition(".")[2]}"', files[RUN_FILE], count=1)
    return {path: _renamed(text, task, package) for path, text in files.items()}


def _read_folder(folder: Traversable) -> dict[str, str]:
    files = (file for file in folder.iterdir() if file.name.endswith(SUFFIXES))
    return {file.name: file.read_text(encoding="utf-8") for file in files}


def _referenced(files: Mapping[str, str]) -> set[str]:
    """Return the modules and tasks of the examples that the files name."""
    return {
        name for text in files.values() for form in (_REFERENCE, _IMPORT_FROM_PACKAGE) for name in form.findall(text)
    }


def _renamed(text: str, task: str, package: str) -> str:
    """Replace dotted names of the examples by those in `package`, and `examples/TASK/` by its folder."""
    text = _REFERENCE.sub(lambda found: package if found[1] == task else f"{package}.{found[1]}", text)
    text = _IMPORT_FROM_PACKAGE.sub(lambda found: f"from {package} import {found[1]}", text)
    return text.replace(f"{PACKAGE}/{task}/", f"{package.replace('.', '/')}/")
