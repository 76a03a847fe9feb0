"""Kills whatever process calls a named function for the n-th time: on the path of a command, it is in all it starts.

KILL_AT is `MODULE:NAME:N:before` or `MODULE:NAME:N:after`; KILL_FLAG is a file that is made by the one that dies, so
that nobody does a second time.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.util
import inspect
import os
import signal
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MODULE, NAME, NUMBER, WHEN = os.environ.get("KILL_AT", ":::").split(":")


class Deadly(importlib.abc.MetaPathFinder):
    """Finds MODULE as everyone does, and has NAME replaced once it is loaded."""

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.loader is not None
        load = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            load(module)
            replace(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def replace(module: ModuleType) -> None:
    *owners, name = NAME.split(".")
    owner: Any = functools.reduce(getattr, owners, module)
    setattr(owner, name, counted(getattr(owner, name)))


def counted(function: Callable[..., Any]) -> Callable[..., Any]:
    num_calls = 0

    def die(when: str) -> None:
        if when == WHEN and num_calls == int(NUMBER) and made(os.environ["KILL_FLAG"]):
            os.kill(os.getpid(), signal.SIGKILL)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal num_calls
        num_calls += 1
        die("before")
        result = function(*args, **kwargs)
        die("after")
        return result

    @functools.wraps(function)
    async def await_call(*args: Any, **kwargs: Any) -> Any:
        nonlocal num_calls
        num_calls += 1
        die("before")
        result = await function(*args, **kwargs)
        die("after")
        return result

    return await_call if inspect.iscoroutinefunction(function) else call


def made(path: str) -> bool:
    """Make the file; False where it is there."""
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


if MODULE:
    sys.meta_path.insert(0, Deadly())
