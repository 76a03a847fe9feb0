"""A registry finds plug-ins by name or dotted path, and names those there are if it finds none."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.errors import InputError
from cluster.registry import Registry


@pytest.fixture
def greetings() -> Registry[Callable[[], str]]:
    registry: Registry[Callable[[], str]] = Registry("greeting")

    @registry.register("hello")
    def hello() -> str:
        return "hello"

    registry.register_path("late", "own_greetings_late:late")
    return registry


def test_a_plugin_is_found_by_its_name(greetings: Registry[Callable[[], str]]) -> None:
    assert greetings.find("hello", key="run.greeting")() == "hello"
    assert "hello" in greetings
    assert greetings.names() == list(greetings) == ["hello", "late"]


def test_a_users_own_plugin_is_found_by_its_dotted_path(
    greetings: Registry[Callable[[], str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_greetings.py").write_text("def good_day():\n    return 'good day'\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert greetings.find("own_greetings:good_day", key="run.greeting")() == "good day"


def test_a_plugin_registered_by_path_is_imported_when_it_is_found(
    greetings: Registry[Callable[[], str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_greetings_late.py").write_text("def late():\n    return 'late'\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert "own_greetings_late" not in sys.modules
    assert greetings.find("late", key="run.greeting")() == "late"


def test_an_unknown_name_is_refused_with_the_names_there_are(greetings: Registry[Callable[[], str]]) -> None:
    with pytest.raises(InputError) as error:
        greetings.find("helo", key="run.greeting")
    message = "no greeting 'helo' (registered: hello, late; or a dotted path package.module:name)"
    assert str(error.value) == f"run.greeting: {message}"


@pytest.mark.parametrize(("name", "says"), [("hello", "registered twice"), ("a:b", "must not contain ':'")])
def test_a_name_is_refused_if_taken_or_like_a_path(
    greetings: Registry[Callable[[], str]], name: str, says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        greetings.register(name)(str)
