"""Check vLLM's engine arguments of the run file by their names, without importing vLLM."""

from __future__ import annotations

import ast
import difflib
import functools
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluster.errors import InputError

SECTION = "rollout_actors.engine"
OWNED_ARGUMENTS = frozenset({"model", "logprobs_mode", "worker_extension_cls"})
"""Arguments that must not be changed for exact log-probabilities and proved swaps."""


def check_arguments(arguments: Mapping[str, Any]) -> None:
    """Raise InputError naming an argument that vLLM does not have, or that the rollout actor sets."""
    known = known_arguments()
    for name in sorted(arguments):
        if name in OWNED_ARGUMENTS:
            raise InputError(f"{SECTION}.{name}", "is set by the rollout actor and cannot be changed: remove it")
        if known and name not in known:
            similar = difflib.get_close_matches(name, known, n=1)
            meant = f" (did you mean {similar[0]}?)" if similar else ""
            raise InputError(f"{SECTION}.{name}", f"vLLM has no engine argument of this name{meant}")


@functools.cache
def known_arguments() -> frozenset[str]:
    """Return the names of vLLM's engine arguments, read from its source; empty if vLLM is not installed."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        return frozenset()
    source = Path(spec.origin).parent / "engine" / "arg_utils.py"
    if not source.is_file():
        return frozenset()
    tree = ast.parse(source.read_text(encoding="utf-8"))
    return frozenset(
        field.target.id
        for node in tree.body
        if isinstance(node, ast.ClassDef) and node.name == "EngineArgs"
        for field in node.body
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
    )
