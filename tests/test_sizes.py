"""The sizes the design asks for, read from the code."""

from __future__ import annotations

import ast
import re
import warnings
from collections import Counter
from pathlib import Path

from tests.support.paths import ROOT

PACKAGES = ("cluster", "rollout_actors", "reward_service", "learner", "deploy", "examples", "benchmarks")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def functions(path: Path) -> list[tuple[str, int]]:
    nodes = ast.walk(ast.parse(path.read_text()))
    return [
        (f"{path.relative_to(ROOT)}:{node.name}", (node.end_lineno or node.lineno) - node.lineno + 1)
        for node in nodes
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]


def test_no_function_is_longer_than_60_lines() -> None:
    assert [f for path in FILES for f in functions(path) if f[1] > 60] == []


def test_most_functions_are_under_30_lines() -> None:
    lengths = [length for path in FILES for _, length in functions(path)]
    assert sum(length > 30 for length in lengths) <= 0.1 * len(lengths)


def test_no_test_name_is_longer_than_70_characters() -> None:
    tests = sorted((ROOT / "tests").rglob("*.py"))
    names = [(place, place.rpartition(":")[2]) for path in tests for place, _ in functions(path)]
    assert [place for place, name in names if name.startswith("test_") and len(name) > 70] == []


def test_no_file_is_longer_than_500_lines() -> None:
    lengths = {str(path.relative_to(ROOT)): path.read_text().count("\n") for path in FILES}
    for path, length in lengths.items():
        if length > 400:
            warnings.warn(f"{path} has {length} lines; split it by what it does before it reaches 500", stacklevel=1)
    assert [path for path, length in lengths.items() if length > 500] == []


def test_no_folder_has_more_than_16_modules() -> None:
    folders = Counter(path.parent for path in FILES if path.name != "__init__.py")
    wide = {str(folder.relative_to(ROOT)): number for folder, number in folders.items() if number > 16}
    assert wide == {}


def test_only_one_file_says_remote() -> None:
    assert [str(path) for path in FILES if ".remote(" in path.read_text() and path.name != "remote.py"] == []


def test_nothing_unpickles_or_evaluates_input() -> None:
    unsafe = re.compile(r"\b(pickle|torch)\.loads?\(|(?<![.\w])eval\(|yaml\.load\(")
    assert [str(path) for path in FILES if unsafe.search(path.read_text())] == []
