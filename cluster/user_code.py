"""Finds what a dotted path of the run file names."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster.errors import InputError


def load(path: str, key: str) -> Callable[..., Any]:
    """The function at `package.module:function`. Raises InputError naming the run file's `key`."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    module_name, _, name = path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except (ImportError, ValueError) as error:
        raise InputError(key, f"cannot import {module_name!r} ({error})") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise InputError(key, f"{module_name} has no function {name!r}")
    return function  # type: ignore[no-any-return]


def place_of(function: Callable[..., Any]) -> str:
    """`file:line` of a function, as far as it can be told."""
    function = inspect.unwrap(getattr(function, "__func__", function))
    try:
        return f"{_short(inspect.getsourcefile(function) or '?')}:{inspect.getsourcelines(function)[1]}"
    except (OSError, TypeError):
        return getattr(function, "__qualname__", repr(function))


def line_that_raised(function: Callable[..., Any], error: BaseException, *, caller: str) -> str:
    """The last line in the function's own file, or in whatever file but the `caller`'s, that the error went through."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != caller]
    own = inspect.getsourcefile(inspect.unwrap(getattr(function, "__func__", function)))
    mine = [frame for frame in frames if own and Path(frame.filename).absolute() == Path(own).absolute()]
    frame = (mine or frames)[-1] if frames else None
    return f"{_short(frame.filename)}:{frame.lineno}" if frame else place_of(function)


def _short(path: str) -> str:
    """Relative to the working directory where it lies beneath it."""
    absolute = Path(path).absolute()
    return str(absolute.relative_to(Path.cwd())) if absolute.is_relative_to(Path.cwd()) else str(absolute)
