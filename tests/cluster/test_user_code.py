"""Functions are found by dotted path, with and without importing their module; errors name the run file's key."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cluster import user_code
from cluster.errors import InputError
from cluster.user_code import load, locate, signature_in_source

Find = Callable[[str, str], object]
SCORERS = (
    "import os\ntry:\n    from math import fsum as fast\nexcept ImportError:\n    fast = sum\n\n\ndef length(): ...\n"
)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with a package; its modules, all called own_*, are forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(user_code, "_FOLDERS", [])
    package = tmp_path / "own_package"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "scorers.py").write_text(SCORERS)
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("own_")]:
        del sys.modules[name]


def test_a_function_in_the_working_directory_is_loaded() -> None:
    assert load("own_package.scorers:length", "key").__name__ == "length"


def test_a_module_beside_the_run_file_is_found_after_search_in(folder: Path) -> None:
    beside = folder / "task"
    beside.mkdir()
    (beside / "own_beside.py").write_text("def f(): ...\n")
    user_code.search_in(beside)
    assert locate("own_beside:f", "key") == "task/own_beside.py:1"
    assert load("own_beside:f", "key").__name__ == "f"


def test_the_working_directory_is_searched_before_other_folders(folder: Path) -> None:
    beside = folder / "task"
    beside.mkdir()
    for place in (folder, beside):
        (place / "own_twice.py").write_text(f"def f(): return {str(place)!r}\n")
    user_code.search_in(beside)
    assert load("own_twice:f", "key")() == str(folder)
    assert locate("own_twice:f", "key") == "own_twice.py:1"


@pytest.mark.parametrize("find", [load, locate])
def test_an_error_lists_the_searched_folders_if_there_is_no_module(folder: Path, find: Find) -> None:
    user_code.search_in(folder / "task")
    with pytest.raises(InputError) as error:
        find("no_such_module:f", "model.builder")
    searched = f"{folder}, {folder / 'task'} and the installed packages"
    assert str(error.value) == f"model.builder: no module 'no_such_module' (searched {searched})"


@pytest.mark.parametrize("find", [load, locate])
@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("own_package.scorers:lenght", "own_package.scorers has no function 'lenght'"),
        ("own_package.scorer:length", "no module 'own_package.scorer' (searched "),
        ("own_package.scorers", "'own_package.scorers' is not of the form package.module:function"),
        (":length", "':length' is not of the form package.module:function"),
    ],
)
def test_an_error_names_the_key_if_there_is_no_such_function(find: Find, path: str, says: str) -> None:
    with pytest.raises(InputError) as error:
        find(path, "model.builder")
    assert error.value.where == "model.builder"
    assert error.value.what.startswith(says)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("import not_installed_anywhere", "ModuleNotFoundError: No module named 'not_installed_anywhere'"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("def (", "SyntaxError: invalid syntax"),
    ],
)
def test_an_error_names_what_a_module_raises_when_imported(folder: Path, source: str, says: str) -> None:
    (folder / "own_broken.py").write_text(source)
    with pytest.raises(InputError) as error:
        load("own_broken:f", "model.builder")
    assert error.value.what.startswith(f"cannot import 'own_broken' ({says}")


def test_a_file_that_does_not_parse_is_named_with_its_line(folder: Path) -> None:
    (folder / "own_package" / "scorers.py").write_text("\ndef length(:\n")
    with pytest.raises(InputError, match=r"own_package/scorers.py:2: "):
        locate("own_package.scorers:length", "model.builder")


def test_a_function_is_located_without_importing_its_module() -> None:
    assert locate("own_package.scorers:length", "key") == "own_package/scorers.py:8"
    assert "own_package.scorers" not in sys.modules


def test_a_name_is_located_if_it_is_bound_by_import_under_try() -> None:
    assert locate("own_package.scorers:fast", "key") == "own_package/scorers.py:3"


@pytest.mark.parametrize(
    "source",
    [
        "from own_package.scorers import *",
        "from own_star import *",
        "from functools import partial\nlength: object = partial(print)",
        "a, length = print, print",
        "with open('/dev/null'):\n    length = print",
        "try:\n    1 / 0\nexcept ZeroDivisionError:\n    length = print",
        "for length in [print]: pass",
        "class Length:\n    def __call__(self): ...\nlength = Length()",
        "class length: ...",
        "globals()['length'] = print",
        "def __getattr__(name): return print",
    ],
)
def test_whatever_load_loads_is_located(folder: Path, source: str) -> None:
    (folder / "own_star.py").write_text("from own_package.scorers import *\n")
    (folder / "own_module.py").write_text(source)
    assert locate("own_module:length", "key").startswith("own_module.py:")
    assert callable(load("own_module:length", "key"))


@pytest.mark.parametrize("source", ["from own_package.scorers import *", "lenght: object", "def f():\n    lenght = 1"])
def test_an_unbound_name_is_refused_by_both(folder: Path, source: str) -> None:
    (folder / "own_module.py").write_text(source)
    for find in (load, locate):
        with pytest.raises(InputError, match="has no function 'lenght'"):
            find("own_module:lenght", "key")


@pytest.mark.parametrize(
    "parameters",
    ["", "a, b", "a, /, b=1", "a, b=1, *c, d, e=2, **f", "*, d, e=None", "a: int, *b: str, c: float = 1.0", "self, a"],
)
def test_signature_in_the_source_is_that_of_the_function(folder: Path, parameters: str) -> None:
    (folder / "own_signed.py").write_text(f"def f({parameters}): ...\n")
    found, real = signature_in_source("own_signed:f", "key"), inspect.signature(load("own_signed:f", "key"))
    assert found is not None
    for name in real.parameters:
        has_default = [each.parameters[name].default is not each.empty for each in (found, real)]
        assert (found.parameters[name].kind, has_default[0]) == (real.parameters[name].kind, has_default[1])
    assert list(found.parameters) == list(real.parameters)


@pytest.mark.parametrize(
    "source",
    [
        "from own_package.scorers import *\n",
        "f = print\n",
        "if f:\n    def f(): ...\nelse:\n    def f(a): ...\n",
        "@g\ndef f(): ...\n",
        "class f: ...\n",
        "from own_loop import f\n",
        "from own_broken import f\n",
    ],
)
def test_signature_is_unknown_if_the_source_does_not_tell_it(folder: Path, source: str) -> None:
    (folder / "own_unclear.py").write_text(source)
    (folder / "own_loop.py").write_text("from own_unclear import f\n")
    (folder / "own_broken.py").write_text("def f(:\n")
    assert signature_in_source("own_unclear:f", "key") is None
