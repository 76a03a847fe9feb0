"""Test that files and folders are written whole or not at all."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from cluster import files
from cluster.errors import InputError

KILL = "os.kill(os.getpid(), signal.SIGKILL)"
WRITE_AND_DIE = f"""
with files.replacing(folder / 'a') as partial:
    partial.write_text('half')
    {KILL}
"""
WRITE_IN_A_FOLDER_AND_DIE = f"""
with files.replacing_folder(folder / 'm') as partial:
    (partial / 'stale').touch()
    {KILL}
"""
DIE_BETWEEN_THE_RENAMES = f"""
partial = files.start_folder(folder / 'm')
(partial / 'weights').write_text('new')
(folder / 'm').rename(folder / '.m.replaced')
{KILL}
"""


def run_and_kill(code: str, folder: Path) -> None:
    """Run `code`, which ends with a SIGKILL of its own process, with `folder` as a Path."""
    imports = "import os, signal, sys\nfrom pathlib import Path\nfrom cluster import files\n"
    program = f"{imports}folder = Path(sys.argv[1])\n{code}"
    done = subprocess.run([sys.executable, "-c", program, str(folder)], timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL


def write_half_and_raise(path: Path, error: BaseException) -> None:
    path.write_text("half")
    raise error


def test_a_file_is_replaced_when_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with files.replacing(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_file_is_unchanged_and_nothing_is_left_if_the_block_raises(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), files.replacing(path) as partial:
        write_half_and_raise(partial, KeyboardInterrupt())
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.process
def test_a_file_is_unchanged_after_a_kill_before_the_rename(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    run_and_kill(WRITE_AND_DIE, tmp_path)
    assert (tmp_path / "a").read_text() == "old"


@pytest.mark.process
def test_leftovers_of_a_kill_are_overwritten_by_the_next_write(tmp_path: Path) -> None:
    run_and_kill(WRITE_AND_DIE, tmp_path)
    assert os.listdir(tmp_path) == [".a.partial"]
    files.write_text(tmp_path / "a", "b")
    assert (tmp_path / "a").read_text() == "b"
    assert os.listdir(tmp_path) == ["a"]


def test_the_file_and_its_folder_are_synced_around_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events = []
    fsync, replace = os.fsync, Path.replace

    def recorded_fsync(descriptor: int) -> None:
        events.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    def recorded_replace(self: Path, target: Path) -> Path:
        events.append("rename")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(Path, "replace", recorded_replace)
    files.write_text(tmp_path / "a", "text")
    assert events == ["file", "rename", "folder"]


def test_a_file_has_the_mode_asked_for_from_the_start(tmp_path: Path) -> None:
    (tmp_path / ".secret.partial").touch(mode=0o644)
    with files.replacing(tmp_path / "secret", mode=0o600) as partial:
        assert stat.S_IMODE(partial.stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "secret").stat().st_mode) == 0o600


def test_a_folder_is_replaced_when_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "model"
    for text in ("old", "new"):
        with files.replacing_folder(path) as partial:
            assert list(partial.iterdir()) == []
            (partial / "inner").mkdir()
            (partial / "inner" / "weights").write_text(text)
    assert (path / "inner" / "weights").read_text() == "new"
    assert os.listdir(path.parent) == ["model"]


def test_a_folder_is_unchanged_and_nothing_is_left_if_the_block_raises(tmp_path: Path) -> None:
    path = tmp_path / "model"
    path.mkdir()
    (path / "weights").write_text("old")
    with pytest.raises(OSError), files.replacing_folder(path) as partial:
        write_half_and_raise(partial / "weights", OSError("no space left on the disk"))
    assert (path / "weights").read_text() == "old"
    assert os.listdir(tmp_path) == ["model"]


@pytest.mark.process
def test_leftovers_in_a_folder_are_deleted_after_a_kill(tmp_path: Path) -> None:
    run_and_kill(WRITE_IN_A_FOLDER_AND_DIE, tmp_path)
    assert not (tmp_path / "m").exists()
    with files.replacing_folder(tmp_path / "m") as partial:
        (partial / "weights").touch()
    assert os.listdir(tmp_path) == ["m"]
    assert os.listdir(tmp_path / "m") == ["weights"]


@pytest.mark.process
def test_a_folder_is_restored_after_a_kill_between_its_two_renames(tmp_path: Path) -> None:
    path = tmp_path / "m"
    path.mkdir()
    (path / "weights").write_text("old")
    run_and_kill(DIE_BETWEEN_THE_RENAMES, tmp_path)
    with pytest.raises(OSError, match="full"), files.replacing_folder(path):
        raise OSError("full")
    assert (path / "weights").read_text() == "old"


def test_json_is_read_as_it_was_written(tmp_path: Path) -> None:
    files.write_json(tmp_path / "a.json", {"name": "Zoë", "step": 3})
    assert files.read_json(tmp_path / "a.json") == {"name": "Zoë", "step": 3}


@pytest.mark.parametrize(("text", "says"), [("{", "not JSON"), ("[1]", "not a JSON object"), (None, "missing")])
def test_read_json_names_the_file_if_it_holds_no_object(tmp_path: Path, text: str | None, says: str) -> None:
    path = tmp_path / "a.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=says) as error:
        files.read_json(path)
    assert error.value.where == str(path)


def test_a_digest_changes_with_a_byte_and_with_the_order(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    first.write_bytes(b"1")
    second.write_bytes(b"2")
    before = files.digest_files([first, second])
    assert files.digest_files([second, first]) != before
    second.write_bytes(b"3")
    assert files.digest_files([first, second]) != before


def test_json_holds_null_for_nan_and_infinities(tmp_path: Path) -> None:
    files.write_json(tmp_path / "a.json", {"a": float("nan"), "b": [1.5, float("inf")], "c": {"d": -float("inf")}})
    assert files.read_json(tmp_path / "a.json") == {"a": None, "b": [1.5, None], "c": {"d": None}}
