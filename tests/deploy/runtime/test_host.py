"""Hosts with proxies, an unwritable home or a long folder for temporary files."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from cluster.errors import InputError
from deploy.runtime import host

SET = ("no_proxy", "NO_PROXY", "RAY_AUTH_TOKEN_PATH", "VLLM_CONFIG_ROOT", "VLLM_CACHE_ROOT", "TRITON_CACHE_DIR")
READ = ("RAY_AUTH_TOKEN", "RAY_AUTH_MODE", "RAY_TMPDIR", "VLLM_RPC_BASE_PATH")


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Remove every variable that is read or set, and give the process a home and a folder for temporary files."""
    proxies = [name for base in host.PROXIES for name in (base, base.upper())]
    for name in (*SET, *READ, *proxies):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name in ("home", "tmp"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))


def test_an_ordinary_host_needs_no_variables() -> None:
    host.prepare_host()
    assert not any(name in os.environ for name in SET)


def test_proxies_are_not_used_for_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("no_proxy", "internal,localhost")
    host.prepare_host()
    host.prepare_host()
    assert os.environ["no_proxy"] == os.environ["NO_PROXY"] == "internal,localhost,127.0.0.1,::1"


def test_a_home_that_cannot_be_written_is_replaced(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    host.prepare_host()
    token = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
    assert token.parent == tmp_path / "tmp" / f"antiphon-{os.getuid()}"
    assert (token.stat().st_mode & 0o777, len(token.read_text())) == (0o600, 64)
    before = token.read_text()
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH")
    host.prepare_host()
    assert Path(os.environ["RAY_AUTH_TOKEN_PATH"]).read_text() == before


def test_a_folder_that_others_can_read_is_not_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    (tmp_path / "tmp" / f"antiphon-{os.getuid()}").mkdir(mode=0o755)
    with pytest.raises(InputError, match="is not a private folder: set HOME"):
        host.prepare_host()


def test_a_folder_with_a_space_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", "/tmp/two words")
    monkeypatch.setattr(tempfile, "tempdir", "/tmp/two words")
    host.prepare_host()
    assert os.environ["TMPDIR"] == tempfile.gettempdir() == "/tmp"
    monkeypatch.setattr(tempfile, "tempdir", "/tmp/two words")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(InputError, match=r"TMPDIR: .* has a space"):
        host.prepare_host()


@pytest.mark.parametrize("variable", ["TMPDIR", "RAY_TMPDIR"])
def test_a_folder_too_long_for_sockets_is_replaced(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "/" + "x" * 38)
    assert host.ray_folder() is None
    monkeypatch.setenv(variable, "/" + "ü" * 30)
    assert host.ray_folder() == "/tmp/ray"
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(InputError, match=f"{variable}: .* is too long for the sockets of Ray"):
        host.ray_folder()
