"""Find the line on which a module's source binds a name at its top level, without importing the module."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

FindSource = Callable[[str], Path | None]
"""Returns the source file of an absolute module name, or None if it has none or is not there."""

_DYNAMIC = {"globals", "vars", "setattr", "exec", "locals"}


def line_that_binds(tree: ast.Module, name: str, package: str, find: FindSource) -> int | None:
    """Return the line that binds `name`, or None if the module surely does not bind it.

    Star imports are followed. A line is also returned if it may bind any name: a star import of a module without
    source, a module's `__getattr__`, a use of `globals()` and the like. `package` is the one that relative imports
    start from.
    """
    return _find(tree, name, package, find, frozenset())


def _find(tree: ast.Module, name: str, package: str, find: FindSource, seen: frozenset[str]) -> int | None:
    unsure = None
    for node in _top_level(tree.body):
        if name in _bound(node):
            return node.lineno
        if isinstance(node, ast.ImportFrom) and node.names[0].name == "*":
            if _star_may_bind(node, name, package, find, seen):
                return node.lineno
        elif _may_bind_anything(node):
            unsure = unsure or node.lineno
    return unsure


def _star_may_bind(node: ast.ImportFrom, name: str, package: str, find: FindSource, seen: frozenset[str]) -> bool:
    parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
    module = ".".join([*parents, *filter(None, [node.module])])
    if module in seen:
        return False
    source = find(module)
    if source is None:
        return True
    inner = module if source.name == "__init__.py" else module.rpartition(".")[0]
    try:
        tree = ast.parse(source.read_bytes(), str(source))
    except SyntaxError:
        return True
    return _find(tree, name, inner, find, seen | {module}) is not None


def _bound(node: ast.stmt) -> set[str]:
    """Return the names that a statement itself binds, without those of statements inside it."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {node.name}
    if isinstance(node, ast.ImportFrom | ast.Import):
        return {alias.asname or alias.name.partition(".")[0] for alias in node.names}
    if isinstance(node, ast.AnnAssign) and node.value is None:
        return set()
    parts = [each for each in ast.iter_child_nodes(node) if not isinstance(each, ast.stmt | ast.ExceptHandler)]
    names = [each for part in parts for each in ast.walk(part) if isinstance(each, ast.Name)]
    return {each.id for each in names if isinstance(each.ctx, ast.Store)}


def _may_bind_anything(node: ast.stmt) -> bool:
    if isinstance(node, ast.FunctionDef):
        return node.name == "__getattr__"
    if isinstance(node, ast.ClassDef | ast.AsyncFunctionDef | ast.Import | ast.ImportFrom):
        return False
    return any(isinstance(each, ast.Name) and each.id in _DYNAMIC for each in ast.walk(node))


def _top_level(statements: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield the statements that run when the module is imported, including those inside compound statements."""
    for statement in statements:
        yield statement
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        for block in ("body", "orelse", "finalbody"):
            yield from _top_level(getattr(statement, block, []))
        for inner in [*getattr(statement, "handlers", []), *getattr(statement, "cases", [])]:
            yield from _top_level(inner.body)
