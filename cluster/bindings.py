"""Find where a module's source binds a name at its top level, without importing the module."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

Definition = ast.FunctionDef | ast.AsyncFunctionDef
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


def definition(tree: ast.Module, name: str, package: str, find: FindSource) -> Definition | None:
    """Return the definition of the function `name`, or None if it is bound in another way, or more than once.

    Names imported from other modules are followed. A decorated function is none: its decorator may change it. Of a
    class, its `__call__` is returned.
    """
    bindings = [node for node in _top_level(tree.body) if name in _bound(node)]
    node = bindings[0] if len(bindings) == 1 else None
    if isinstance(node, ast.ImportFrom):
        source, inner = _imported_from(node, package, find)
        original = next(alias.name for alias in node.names if (alias.asname or alias.name) == name)
        return None if source is None else definition(_parsed(source), original, inner, find)
    if isinstance(node, ast.ClassDef) and not node.decorator_list:
        called = [each for each in node.body if isinstance(each, Definition) and each.name == "__call__"]
        node = called[0] if len(called) == 1 else None
    return node if isinstance(node, Definition) and not node.decorator_list else None


def signature_of(node: Definition) -> inspect.Signature:
    """Return the signature of a definition; a method's without `self`. Default values are not those of the source."""
    arguments, kinds = node.args, inspect.Parameter
    positional = [
        *((each, kinds.POSITIONAL_ONLY) for each in arguments.posonlyargs),
        *((each, kinds.POSITIONAL_OR_KEYWORD) for each in arguments.args),
    ]
    num_required = len(positional) - len(arguments.defaults)
    found = [
        kinds(each.arg, kind, default=kinds.empty if position < num_required else None)
        for position, (each, kind) in enumerate(positional)
    ][node.name == "__call__" :]
    if arguments.vararg:
        found.append(kinds(arguments.vararg.arg, kinds.VAR_POSITIONAL))
    for each, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        found.append(kinds(each.arg, kinds.KEYWORD_ONLY, default=kinds.empty if default is None else None))
    if arguments.kwarg:
        found.append(kinds(arguments.kwarg.arg, kinds.VAR_KEYWORD))
    return inspect.Signature(found)


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
    module = _module_of(node, package)
    if module in seen:
        return False
    source, inner = _imported_from(node, package, find)
    if source is None:
        return True
    try:
        tree = ast.parse(source.read_bytes(), str(source))
    except SyntaxError:
        return True
    return _find(tree, name, inner, find, seen | {module}) is not None


def _module_of(node: ast.ImportFrom, package: str) -> str:
    """Return the absolute name of the module that a statement imports from."""
    parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
    return ".".join([*parents, *filter(None, [node.module])])


def _imported_from(node: ast.ImportFrom, package: str, find: FindSource) -> tuple[Path | None, str]:
    """Return the source that a statement imports from, if it has one, and the package of that module."""
    module = _module_of(node, package)
    source = find(module)
    is_package = source is not None and source.name == "__init__.py"
    return source, module if is_package else module.rpartition(".")[0]


def _parsed(source: Path) -> ast.Module:
    return ast.parse(source.read_bytes(), str(source))


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
