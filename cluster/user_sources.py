"""Find the source files that a function of the run file depends on: its module's and those that it imports.

Follows imports as they are written, without importing anything, and only to modules in the searched folders: installed
packages and Antiphon itself are not the user's code.
"""

from __future__ import annotations

import ast
import os
from collections.abc import Iterator
from importlib.machinery import PathFinder
from pathlib import Path

from cluster.user_code import folders, source_of

OWN_PACKAGES = frozenset({"cluster", "rollout_actors", "reward_service", "learner", "deploy"})
MAX_FILES = 500
"""No more files are followed, so that a folder full of scripts does not slow the start."""


def sources(path: str, key: str) -> dict[str, Path]:
    """Return the source files by the names of their modules; none if the module is not Python source.

    Raises InputError naming the run file's `key` if the module is not there.
    """
    first = path.partition(":")[0]
    origin = source_of(first, key)
    found = {first: origin} if origin is not None else {}
    waiting = list(found)
    while waiting and len(found) < MAX_FILES:
        module = waiting.pop()
        for name in (*_with_packages(module), *_imports(module, found[module])):
            file = None if name in found else _file_of(name)
            if file is not None:
                found[name] = file
                waiting.append(name)
    return found


def _imports(module: str, file: Path) -> Iterator[str]:
    """Yield the full names of the modules that a file may import, in functions too; none if it does not parse."""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):
        return
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from _with_packages(alias.name)
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(node, package)
            yield from _with_packages(base)
            yield from (f"{base}.{alias.name}" for alias in node.names if base and alias.name != "*")


def _absolute(node: ast.ImportFrom, package: str) -> str:
    """Return the full name of the module that a `from` imports from."""
    if not node.level:
        return node.module or ""
    parent = package.split(".")[: len(package.split(".")) - node.level + 1]
    return ".".join([*parent, *filter(None, [node.module])])


def _with_packages(name: str) -> Iterator[str]:
    parts = name.split(".")
    yield from (".".join(parts[:num]) for num in range(1, len(parts) + 1))


def _file_of(name: str) -> Path | None:
    """Return the source file of a module in the searched folders, or None."""
    first, *others = name.split(".")
    if not first or first in OWN_PACKAGES:
        return None
    spec = PathFinder.find_spec(first, _searched())
    for part in others:
        if spec is None or spec.submodule_search_locations is None:
            return None
        spec = PathFinder.find_spec(f"{spec.name}.{part}", list(spec.submodule_search_locations))
    return Path(spec.origin) if spec is not None and spec.origin and spec.origin.endswith(".py") else None


def _searched() -> list[str]:
    """Return the folders of the user's modules: those of the run and of PYTHONPATH."""
    return [*folders(), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
