"""`antiphon inspect` on files of trajectories, and the batch that a learner rejected."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from cluster.errors import LearnerError
from cluster.trajectory import Segment, Trajectory, Turn, read_trajectories, write_trajectories
from deploy.cli import app
from deploy.ring.healing import keep_batch

NAN = float("nan")
Antiphon = Callable[..., tuple[int, str, str]]


def trajectory(group: int, **changes: Any) -> Trajectory:
    plain = Trajectory(
        uid=f"0-{group}-0",
        group=group,
        task="letters",
        token_ids=[3, 4, 5, 6, 7],
        mask=[False, False, True, True, True],
        behavior_logprobs=[0.0, 0.0, -0.5, -0.25, -2.0],
        segments=[Segment(1, 2, 1, 11, "rollout-0"), Segment(2, 3, 2, 12, "rollout-1")],
        turns=[Turn(2, 3)],
        admission_index=group,
        finish_reason="stop",
        reward=0.5,
        reward_parts={"brevity": 0.125},
        scorer_version="v1",
        step=2,
    )
    return replace(plain, **changes)


@pytest.fixture
def antiphon(capsys: pytest.CaptureFixture[str]) -> Antiphon:
    """Exit code, stdout and the last line of stderr of a command."""

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            app(list(arguments))
        out, err = capsys.readouterr()
        return int(str(ended.value.code)), out, (err.splitlines() or [""])[-1]

    return run


@pytest.fixture
def run_path(tmp_path: Path) -> Path:
    """A run directory with a tokenizer of single letters and the file of one step, whose third row has a NaN."""
    from tokenizers import Tokenizer, models

    path = tmp_path / "letters"
    (path / "model").mkdir(parents=True)
    tokenizer = Tokenizer(models.WordLevel({chr(ord("a") + index): index for index in range(26)}, unk_token="a"))
    tokenizer.save(str(path / "model" / "tokenizer.json"))
    (path / "config.toml").write_text('[model]\nbuilder = "task:build"\n[data]\nbuilder = "task:data"\n')
    rows = [trajectory(0), trajectory(1), trajectory(2, reward=NAN), trajectory(3, reward=1.25)]
    write_trajectories(path / "trajectories" / "step-000002.arrow", rows)
    return path


def test_inspect_lists_trajectories_and_names_values_not_finite(antiphon: Antiphon, run_path: Path) -> None:
    code, out, _ = antiphon("inspect", str(run_path / "trajectories" / "step-000002.arrow"))
    assert code == 0
    rows = {
        cells[0]: cells[1:] for line in out.splitlines() if len(cells := [c.strip() for c in line.split("│")[1:]]) > 8
    }
    assert rows["0-3-0"][:9] == ["letters", "3", "1.25", "5", "1, 2", "stop", "-2", "-0.25", ""]
    assert (rows["0-2-0"][2], rows["0-2-0"][8]) == ("nan", "reward")
    assert "4 of 4 trajectories, 1 with values that are not finite" in out


def test_inspect_lists_at_most_limit_trajectories(antiphon: Antiphon, run_path: Path) -> None:
    code, out, _ = antiphon("inspect", str(run_path / "trajectories" / "step-000002.arrow"), "--limit", "2")
    assert (code, "0-1-0" in out, "0-2-0" in out) == (0, True, False)
    assert "2 of 4 trajectories, 1 with" in out


def test_inspect_shows_one_trajectory_completely_by_uid(antiphon: Antiphon, run_path: Path) -> None:
    code, out, _ = antiphon("inspect", str(run_path / "trajectories" / "step-000002.arrow"), "--uid", "0-1-0")
    assert code == 0
    lines = [line.strip() for line in out.splitlines()]
    assert lines[lines.index("prompt") + 1].split() == ["d", "e"]
    assert lines[lines.index("response") + 1].split() == ["f", "g", "h"]
    for fact in ("brevity", "0.125", "rollout-1", "v1"):
        assert fact in out


def test_inspect_shows_token_ids_if_there_is_no_tokenizer(antiphon: Antiphon, tmp_path: Path) -> None:
    write_trajectories(tmp_path / "alone.arrow", [trajectory(0)])
    code, out, _ = antiphon("inspect", str(tmp_path / "alone.arrow"), "--uid", "0-0-0")
    assert code == 0
    assert "5 6 7" in out


def test_inspect_names_a_missing_uid(antiphon: Antiphon, run_path: Path) -> None:
    path = run_path / "trajectories" / "step-000002.arrow"
    code, _, last = antiphon("inspect", str(path), "--uid", "0-9-0")
    assert (code, last) == (2, f"error: --uid: no trajectory 0-9-0 in {path}")


@pytest.mark.parametrize("kind", ["missing", "folder", "empty", "text", "other columns", "cut short"])
def test_inspect_fails_if_the_file_has_no_trajectories(antiphon: Antiphon, run_path: Path, kind: str) -> None:
    path = run_path / "trajectories" / "other.arrow"
    whole = (run_path / "trajectories" / "step-000002.arrow").read_bytes()
    contents = {"empty": b"", "text": b"some other text" * 100, "cut short": whole[: len(whole) // 2]}
    if kind == "folder":
        path.mkdir()
    elif kind == "other columns":
        table = pa.table({"uid": ["0-0-0"]})
        with pa.ipc.new_file(str(path), table.schema) as writer:
            writer.write_table(table)
    elif kind in contents:
        path.write_bytes(contents[kind])
    code, _, last = antiphon("inspect", str(path))
    assert code == 2
    assert last.startswith(f"error: {path}: not a file of trajectories ("), last


def test_inspect_escapes_control_characters(antiphon: Antiphon, tmp_path: Path) -> None:
    write_trajectories(tmp_path / "alone.arrow", [trajectory(0, uid="\x1b[2J", finish_reason="\x1b]0;x\x07")])
    code, out, _ = antiphon("inspect", str(tmp_path / "alone.arrow"))
    assert code == 0
    assert "\x1b" not in out
    assert "\\x1b[2J" in out


@pytest.mark.process
def test_inspect_imports_neither_torch_nor_ray(run_path: Path) -> None:
    import subprocess

    file = run_path / "trajectories" / "step-000002.arrow"
    code = (
        "import sys; from pathlib import Path; from deploy.commands.history.inspect import inspect\n"
        f"inspect(Path({str(file)!r}), uid='0-1-0', limit=1)\n"
        "assert not {'torch', 'ray', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)


def test_a_rejected_batch_is_kept_with_the_named_trajectories_first(tmp_path: Path) -> None:
    groups = [
        [trajectory(0), trajectory(1)],
        [trajectory(2, reward=NAN), trajectory(3, behavior_logprobs=[-math.inf] * 5)],
    ]
    error = keep_batch(tmp_path, 12, groups, LearnerError("trajectory 0-2-0", "its reward is nan", uids=["0-2-0"]))
    path = tmp_path / "failed" / "step-000012.arrow"
    assert str(error) == f"trajectory 0-2-0: its reward is nan (antiphon inspect {path})"
    kept = read_trajectories(path)
    assert [t.uid for t in kept] == ["0-2-0", "0-0-0", "0-1-0", "0-3-0"]
    assert math.isnan(kept[0].reward or 0.0)
    assert kept[3].behavior_logprobs == [-math.inf] * 5


def test_the_error_is_reported_if_the_batch_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "failed").write_text("in the way")
    error = keep_batch(tmp_path, 1, [[trajectory(0)]], LearnerError("trajectory 0-0-0", "bad", uids=["0-0-0"]))
    assert str(error).startswith("trajectory 0-0-0: bad (its batch could not be written to ")
