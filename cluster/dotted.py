"""Finds what a dotted path of the run file names."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
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
