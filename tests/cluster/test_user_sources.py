"""Test which source files a user's function depends on."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.errors import InputError
from cluster.user_sources import sources

FILES = {
    "rewards/__init__.py": "from .rules import score\n",
    "rewards/rules.py": "import math, numpy, cluster.files\nfrom . import words\nfrom .deep.table import TABLE\n",
    "rewards/words.py": "def late():\n    from shared import *\n",
    "rewards/deep/__init__.py": "",
    "rewards/deep/table.py": "from ..words import late\nTABLE = {}\n",
    "rewards/unused.py": "",
    "shared.py": "import rewards.rules\nimport broken\n",
    "broken.py": "def (:\n",
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, content in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", "")
    return tmp_path


def test_a_functions_sources_are_its_module_and_those_it_imports(folder: Path) -> None:
    found = sources("rewards.rules:score", "reward_service.scorer")
    assert {name: path.relative_to(folder).as_posix() for name, path in found.items()} == {
        "rewards.rules": "rewards/rules.py",
        "rewards": "rewards/__init__.py",
        "rewards.words": "rewards/words.py",
        "rewards.deep": "rewards/deep/__init__.py",
        "rewards.deep.table": "rewards/deep/table.py",
        "shared": "shared.py",
        "broken": "broken.py",
    }


def test_modules_on_the_python_path_are_the_users_too(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "elsewhere").mkdir()
    (folder / "elsewhere" / "lib.py").write_text("")
    (folder / "task.py").write_text("import lib\n")
    monkeypatch.setenv("PYTHONPATH", str(folder / "elsewhere"))
    assert sources("task:reward", "key")["lib"] == folder / "elsewhere" / "lib.py"


def test_the_packages_of_a_module_belong_to_its_sources(folder: Path) -> None:
    assert list(sources("rewards.unused:score", "key"))[:2] == ["rewards.unused", "rewards"]


def test_an_installed_function_has_its_own_module_only(folder: Path) -> None:
    assert list(sources("numpy.linalg:norm", "key")) == ["numpy.linalg"]


def test_a_missing_module_is_named_by_its_key(folder: Path) -> None:
    with pytest.raises(InputError, match=r"^reward_service.scorer: no module 'nowhere'"):
        sources("nowhere:score", "reward_service.scorer")
