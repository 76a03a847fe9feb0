"""Find and import the functions that the run file names by dotted path, such as `my_task.scorers:length`.

A module is looked for in the working directory, in the folders added by `search_in`, then among installed packages.
`load` imports it; `locate` reads its source without importing it. Errors name the run file's key.
"""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Callable
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

from cluster.bindings import definition, line_that_binds, signature_of
from cluster.errors import InputError

_FOLDERS: list[str] = []


def search_in(folder: Path) -> None:
    """Also look for modules in `folder`, such as the folder of the run file, in this process.

    Call it before Ray starts: Ray's workers take over the driver's module search path.
    """
    name = str(folder.absolute())
    if name not in folders():
        _FOLDERS.append(name)
    _extend_module_path()


def folders() -> list[str]:
    """Return the folders that are searched before the installed packages, first the working directory."""
    return [os.getcwd(), *_FOLDERS]


def python_path() -> str:
    """Return PYTHONPATH for the processes of a run: the searched folders, then this process's PYTHONPATH."""
    return os.pathsep.join([*folders(), *filter(None, [os.environ.get("PYTHONPATH")])])


def load(path: str, key: str) -> Callable[..., Any]:
    """Import the function at `package.module:function`.

    Raises InputError naming the run file's `key` if there is no such function or its module raises when imported.
    """
    module_name, name = _split(path, key)
    _extend_module_path()
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # the boundary to the user's code: a module may raise anything when it is imported
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing and (module_name == missing or module_name.startswith(f"{missing}.")):
            raise _not_found(missing, key) from error
        raise InputError(key, f"cannot import {module_name!r} ({type(error).__name__}: {error})") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise InputError(key, f"{module_name} has no function {name!r}")
    return function  # type: ignore[no-any-return]


def locate(path: str, key: str) -> str:
    """Return `file:line` of the function at `package.module:function`, found in the source without importing it.

    Raises InputError naming the run file's `key` if it is not there or its module does not parse.
    """
    module, name = _split(path, key)
    origin = _find_source(module, key)
    if origin is None:
        return "not Python source, so not looked into"
    line = line_that_binds(_parsed(origin, key), name, _package_of(module, origin), _source_if_found)
    if line is None:
        raise InputError(key, f"{module} has no function {name!r}")
    return f"{os.path.relpath(origin)}:{line}"


def signature_in_source(path: str, key: str) -> inspect.Signature | None:
    """Return the signature of the function at `package.module:function`, read without importing it.

    None if the source does not tell: it is no plain function or class, or no Python source. Raises InputError as
    `locate` does.
    """
    module, name = _split(path, key)
    origin = _find_source(module, key)
    if origin is None:
        return None
    try:
        node = definition(_parsed(origin, key), name, _package_of(module, origin), _source_if_found)
    except (SyntaxError, RecursionError):  # of a module that it imports from
        return None
    return None if node is None else signature_of(node)


def _parsed(origin: Path, key: str) -> ast.Module:
    try:
        return ast.parse(origin.read_bytes(), str(origin))
    except SyntaxError as error:
        raise InputError(key, f"{origin}:{error.lineno}: {error.msg}") from error


def _package_of(module: str, origin: Path) -> str:
    """Return the package that relative imports of a module start from."""
    return module if origin.name == "__init__.py" else module.rpartition(".")[0]


def source_of(module: str, key: str) -> Path | None:
    """Return the source file of a module, or None if it is not Python source; raises InputError as `locate` does."""
    return _find_source(module, key)


def source_file(function: Callable[..., Any]) -> str | None:
    """Return the source file of a function, partial, class or callable object, or None if it has none."""
    try:
        return inspect.getsourcefile(_code_of(function))
    except TypeError:  # a builtin
        return None


def place_of(function: Callable[..., Any]) -> str:
    """Return `file:line` of a function, or its name if its source is not available."""
    function = _code_of(function)
    try:
        return f"{_short(inspect.getsourcefile(function) or '?')}:{inspect.getsourcelines(function)[1]}"
    except (OSError, TypeError):
        return getattr(function, "__qualname__", repr(function))


def line_that_raised(function: Callable[..., Any], error: BaseException, *, caller: str) -> str:
    """Return `file:line` of the last frame in the function's own file, else of the last one outside file `caller`."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != caller]
    own = source_file(function)
    mine = [frame for frame in frames if own and Path(frame.filename).absolute() == Path(own).absolute()]
    frame = (mine or frames)[-1] if frames else None
    return f"{_short(frame.filename)}:{frame.lineno}" if frame else place_of(function)


def _extend_module_path() -> None:
    for folder in reversed(folders()):
        if folder not in sys.path:
            sys.path.insert(0, folder)


def _split(path: str, key: str) -> tuple[str, str]:
    module, _, name = path.partition(":")
    if not module or not name:
        raise InputError(key, f"{path!r} is not of the form package.module:function")
    return module, name


def _not_found(module: str, key: str) -> InputError:
    return InputError(key, f"no module {module!r} (searched {', '.join(folders())} and the installed packages)")


def _find_source(module: str, key: str) -> Path | None:
    """Return the module's source file, or None if it is not Python source."""
    first, *others = module.split(".")
    spec = _find_top_level(first)
    for part in others:
        if spec is None or spec.submodule_search_locations is None:
            spec = None
            break
        spec = PathFinder.find_spec(f"{spec.name}.{part}", list(spec.submodule_search_locations))
    if spec is None:
        raise _not_found(module, key)
    return Path(spec.origin) if spec.origin and spec.origin.endswith(".py") else None


def _find_top_level(name: str) -> ModuleSpec | None:
    found = PathFinder.find_spec(name, folders())
    return found or (None if name in sys.builtin_module_names else importlib.util.find_spec(name))


def _source_if_found(module: str) -> Path | None:
    try:
        return _find_source(module, "")
    except (InputError, ImportError, ValueError):
        return None


def _code_of(function: Any) -> Any:
    """Return what has the source: a partial's function, a callable object's class, a method's function."""
    while isinstance(function, functools.partial):
        function = function.func
    function = inspect.unwrap(getattr(function, "__func__", function))
    is_code = inspect.isroutine(function) or inspect.isclass(function)
    return function if is_code else type(function)


def _short(path: str) -> str:
    """Return the path relative to the working directory if it lies below it, else absolute."""
    absolute = Path(path).absolute()
    return str(absolute.relative_to(Path.cwd())) if absolute.is_relative_to(Path.cwd()) else str(absolute)
