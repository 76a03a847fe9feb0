"""`antiphon play` with a person or a pipe in place of the policy, as real commands in separate processes."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT

pytestmark = pytest.mark.process

GAME = ROOT / "examples" / "game" / "run.toml"
WORLDS = "tests.support.environments"
TASK = """
[run]
stages = ["ppo"]
[model]
builder = "task:build"
[reward_service]
scorer = "none"
[environment]
path = "{path}"
[data]
{data}
"""


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "deploy.cli", "play", *arguments]


def play(*arguments: str, answers: str = "") -> tuple[int, list[str], str]:
    """Exit code, the lines on stdout and the last one on stderr."""
    done = subprocess.run(
        command(*arguments), input=answers, capture_output=True, text=True, timeout=60, cwd=ROOT, env=environment()
    )
    return done.returncode, done.stdout.splitlines(), (done.stderr.splitlines() or [""])[-1]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def task(folder: Path, path: str, *lines: str, data: str = 'builder = "task:build"') -> str:
    file = folder / "run.toml"
    file.write_text(TASK.format(path=path, data=data) + "\n".join(lines) + "\n")
    return str(file)


def test_a_game_can_be_won_from_a_pipe() -> None:
    code, lines, _ = play(str(GAME), "--set", "environment.settings.perfect_share = 0.0", answers="5\n1\n9\n3\n")
    assert code == 0
    assert lines[:3] == ["user: 1 2 3 | 4 5 6 | 7 8 9", "assistant: 5", "reward 0"]
    *_, reward, board, _, why, total, first, second, third = lines
    assert (reward, board) == ("reward 1", "user: won")
    assert (why, total) == ("ended: the environment ended it", "total reward 1 in 3 turns")
    assert [first, second, third] == ["  not_lost 1", "  won 1", "  legal 1"]


def test_the_seed_decides_who_begins_and_an_illegal_move_loses() -> None:
    starts = {seed: play(str(GAME), "--seed", seed, answers="x\n")[1] for seed in ("0", "4")}
    assert "o" not in starts["0"][0].removeprefix("user: ")
    assert starts["4"][0] == "user: 1 2 3 | 4 5 6 | o7 8 9"
    assert starts["0"][3:6] == ["user: illegal", "", "ended: the environment ended it"]


def test_play_ends_with_the_input_and_at_max_turns() -> None:
    code, lines, _ = play(str(GAME), answers="5")
    assert (code, lines[-2:]) == (0, ["ended: no more input", "total reward 0 in 1 turn"])
    code, lines, _ = play(str(GAME), "--set", "environment.max_turns = 2", answers="5\n1\n9\n")
    assert (code, lines[-2:]) == (0, ["ended: environment.max_turns = 2", "total reward 0 in 2 turns"])


def test_play_passes_the_rows_columns_and_lists_the_tools(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "word": "-zero"}\n{"prompt": "b", "word": "-one"}\n')
    target = task(tmp_path, f"{WORLDS}:Adder", data='prompts = "rows.jsonl"')
    call = '{"name": "add", "arguments": {"first": 2, "second": 3}}'
    code, lines, _ = play(target, "--seed", "3", answers=f"{call}\n\x1b[2Jyes\nno\n")
    assert code == 0
    assert lines[0].endswith("-one")
    assert "  add(first, second): Add two numbers." in lines
    assert lines[lines.index(f"assistant: {call}") + 1 :][:2] == ["reward 0", "tool: 5"]
    assert "assistant: \\x1b[2Jyes" in lines
    assert lines[-3:] == ["ended: the environment ended it", "total reward 9 in 3 turns", "  answers 2"]


def test_a_fault_of_the_environment_names_file_and_line(tmp_path: Path) -> None:
    target = task(tmp_path, f"{WORLDS}:Odd", "[environment.settings]", 'how = "raises"')
    code, lines, last = play(target, answers="a\n")
    assert (code, lines[-2:]) == (1, ["ended: the environment failed", "total reward 0 in 0 turns"])
    assert last.startswith("error: tests/support/environments.py:"), last
    assert last.endswith("step raised RuntimeError: no luck")


@pytest.mark.parametrize(
    ("path", "data", "error"),
    [
        ("nowhere:Game", 'builder = "task:build"', "error: environment.path: no module 'nowhere' (searched "),
        (f"{WORLDS}:Echo", 'prompts = "gone.jsonl"', "gone.jsonl: "),
        (f"{WORLDS}:NoStep", 'builder = "task:build"', "has no method step"),
    ],
)
def test_play_fails_before_the_first_turn_if_the_task_is_bad(tmp_path: Path, path: str, data: str, error: str) -> None:
    code, lines, last = play(task(tmp_path, path, data=data), answers="a\n")
    assert (code in (1, 2), lines) == (True, [])
    assert error in last


def test_play_fails_without_an_environment() -> None:
    code, lines, last = play(str(ROOT / "examples" / "letters" / "run.toml"))
    assert (code, lines) == (2, [])
    assert last == "error: environment.path: is not set; antiphon play needs an environment"


@pytest.mark.parametrize("apart", ["false", "true"])
def test_an_interrupt_ends_play_without_a_traceback(apart: str) -> None:
    process = subprocess.Popen(
        command(str(GAME), "--set", f"environment.own_process = {apart}"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environment(),
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline().startswith("user: ")
    os.killpg(process.pid, signal.SIGINT)
    out, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (130, "")
    assert "ended: interrupted" in out


def test_play_prompts_for_answers_in_a_terminal_and_ends_at_control_d() -> None:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        command(str(GAME)), stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT, env=environment()
    )
    os.close(theirs)
    os.write(ours, b"5\n\x04")
    out, errors = process.communicate(timeout=30)
    os.close(ours)
    assert (process.returncode, errors) == (0, b"")
    text = out.decode()
    assert text.count("answer> ") == 2
    assert "ended: no more input" in text
    assert "assistant: " not in text


def test_play_imports_neither_torch_nor_ray_nor_transformers() -> None:
    code = (
        "import sys; from pathlib import Path; from deploy.commands.policy.play import play_conversation\n"
        "from deploy.run.open import read_target\n"
        f"play_conversation(*read_target(Path({str(GAME)!r})), task=None, seed=0)\n"
        "assert not {'torch', 'ray', 'transformers', 'vllm'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        input="5\n",
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr


SEVERAL = """
[run]
stages = ["ppo"]
[model]
builder = "task:build"
[tasks.sums]
builder = "task:build"
scorer = "task:score"
[tasks.echo]
scorer = "none"
[tasks.echo.environment]
path = "tests.support.environments:Echo"
settings = { num_turns = 2 }
"""


def test_play_picks_the_only_task_with_an_environment(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(SEVERAL)
    code, lines, _ = play(str(file), answers="a\nb\n")
    assert (code, lines[-2:]) == (0, lines[-2:])
    assert any(line.startswith("total reward") and line.endswith("in 2 turns") for line in lines)
    assert play(str(file), "--task", "sums")[2].endswith("no task 'sums' has an environment; tasks with one: echo")


def test_play_needs_a_task_name_if_several_have_an_environment(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(SEVERAL + SEVERAL.partition("[tasks.echo]")[2].join(["[tasks.other]", ""]).replace("echo", "other"))
    code, lines, last = play(str(file), answers="a\nb\n")
    assert (code, lines, last) == (2, [], "error: --task: several tasks have an environment; choose one of echo, other")
    assert play(str(file), "--task", "other", answers="a\nb\n")[0] == 0
