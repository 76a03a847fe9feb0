"""Test the view: its live display, plain lines and tables, at two widths."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from deploy.evaluation.answers import Regression
from deploy.terminal.view import View

STEP = {
    "learner/reward_mean": 2.238,
    "learner/kl_nats": 4.777,
    "rollout_actors/response_length_tokens": 9.13,
    "cluster/policy_lag_mean": 0.97,
    "cluster/policy_lag_max": 1,
    "rollout_actors/tokens_per_s": 4210.4,
}


class Clock:
    """A clock that tests set."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def plain(width: int = 100) -> Console:
    return Console(file=io.StringIO(), width=width)


def text(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_line_is_printed_every_few_seconds_without_a_terminal() -> None:
    console, clock = plain(), Clock()
    with View("reviews", console, clock) as view:
        view.stage("ppo", 8)
        for step in range(1, 9):
            clock.now += 2
            view.step({"step": step, **STEP})
    lines = text(console).splitlines()
    figures = "reward 2.238  KL 4.78 nats  length 9.1 tokens  lag 0.97  max lag 1  4,210 tokens/s"
    assert lines == [
        "reviews",
        "ppo: starting",
        f"ppo 1 of 8  {figures}",
        f"ppo 4 of 8  {figures}  0:08 left",
        f"ppo 7 of 8  {figures}  0:02 left",
        f"ppo 8 of 8  {figures}",
        "ppo: done in 0:16",
    ]


def test_a_bounded_cost_is_shown_with_its_multiplier() -> None:
    console = plain()
    with View("reviews", console, Clock()) as view:
        view.stage("ppo", 8)
        view.step({"step": 8, **STEP, "learner/cost_mean": 0.0625, "learner/constraint_multiplier": 1.5})
    assert "KL 4.78 nats  cost 0.062  multiplier 1.50  length 9.1 tokens" in text(console)


def shown(view: View) -> str:
    screen = plain(200)
    screen.print(view.display())
    return text(screen)


@pytest.mark.parametrize("width", [80, 120])
def test_the_display_shows_finished_and_current_stages(width: int) -> None:
    clock, screen = Clock(), plain(width)
    view = View("reviews  runs/reviews", plain(width), clock)
    view.stage("sft", 250)
    clock.now += 7
    view.step({"step": 250, "loss": 0.612})
    view.stage("ppo", 100)
    for step in range(1, 44):
        clock.now += 1
        view.step({"step": step, **STEP, "learner/reward_mean": step / 43})
    screen.print(view.display())
    lines = text(screen).splitlines()
    assert lines[0].rstrip() == "reviews  runs/reviews"
    assert lines[1].split() == ["✓", "sft", "0:07", "250", "done", "loss", "0.6120"]
    assert lines[2].startswith("●  ppo")
    assert lines[2].rstrip().endswith("43 of 100  0:57 left")
    assert "██  reward 1.000  KL 4.78 nats" in lines[3]
    assert all(len(line) <= width for line in lines)


def test_a_failed_stage_is_not_reported_as_done() -> None:
    console = plain()
    view = View("", console)
    view.stage("ppo", 8)
    view.__exit__(RuntimeError, RuntimeError(), None)
    assert text(console) == "ppo: starting\n"


def test_notes_are_printed_without_markup() -> None:
    console = plain()
    View(console=console).note("[bold] is not markup, 3 of 4 swaps proved")
    assert text(console) == "[bold] is not markup, 3 of 4 swaps proved\n"


def test_the_table_shows_every_metric_before_and_after() -> None:
    console = plain(80)
    View(console=console).table_before_after(
        {"oracle": -0.13, "kl_nats": 0}, {"oracle": 3.99, "kl_nats": 5.6, "new": 1}
    )
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in text(console).splitlines() if "│" in line]
    assert rows == [
        ["", "before", "after", "change"],
        ["oracle", "-0.130", "3.990", "+4.120"],
        ["KL (nats)", "0.000", "5.600", "+5.600"],
        ["new", "", "1.000", ""],
    ]


@pytest.mark.parametrize("width", [80, 120])
def test_responses_are_printed_side_by_side(width: int) -> None:
    console = plain(width)
    View(console=console).responses(["the food"], [" was [red]bad"], [""])
    (line,) = [line for line in text(console).splitlines() if "the food" in line]
    assert [cell.strip() for cell in line.strip("│").split("│")] == ["the food", "was [red]bad", "(empty)"]


def test_control_characters_of_model_text_are_escaped() -> None:
    hostile, console = "\x1b]0;title\x07\x9b2J", plain(120)
    view = View(console=console)
    view.responses([hostile], [hostile], [hostile])
    view.regressions([Regression(hostile, hostile, hostile, 1.0, 0.5)])
    assert not {"\x1b", "\x07", "\x9b"} & set(text(console))
    assert text(console).count(r"\x1b]0;title\x07\x9b2J") == 6


def test_a_terminal_gets_a_live_display() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=80, _environ={"TERM": "xterm"})
    with View("reviews", console) as view:
        view.stage("sft", 2)
        view.step({"step": 1, "loss": 1.0})
        view.note("a note above it")
    assert "a note above it" in text(console)
    assert "\x1b[?25l" in text(console)


def test_an_evaluation_is_shown_for_the_run_and_each_task_or_for_one_task() -> None:
    before = {"reward": 0.5, "tasks": {"sums": {"accuracy": 0.25}}}
    after = {"reward": 0.75, "tasks": {"sums": {"accuracy": 0.5}, "games": {"won": 1.0}}}
    whole, one = plain(80), plain(80)
    View(console=whole).evaluated(before, after)
    titles = [line.strip() for line in text(whole).splitlines() if "before and after" in line.lower()]
    assert titles == ["Before and after PPO", "sums: before and after PPO", "games: before and after PPO"]
    assert "tasks" not in text(whole)
    View(console=one).evaluated(before, after, task="sums")
    assert "sums: before and after PPO" in text(one)
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in text(one).splitlines() if "│" in line]
    assert rows == [["", "before", "after", "change"], ["accuracy", "0.250", "0.500", "+0.250"]]


def test_the_wait_for_the_first_step_is_told_part_by_part() -> None:
    clock, console = Clock(), plain(200)
    with View("letters", console, clock) as view:
        with view.starting("Ray"):
            clock.now += 6
        view.stage("ppo", 8)
        with view.starting("engine"):
            clock.now += 20
            assert "engine: starting 0:20  Ray: ready 0:06" in shown(view)
        view.wait_for("first responses")
        assert "first responses: starting 0:00  Ray: ready 0:06  engine: ready 0:20" in shown(view)
        view.step({"step": 1})
        assert "ready" not in shown(view)
    lines = [line for line in text(console).splitlines() if "starting" in line or "ready" in line]
    assert lines == [
        "Ray: starting",
        "Ray: ready in 0:06",
        "ppo: starting",
        "engine: starting",
        "engine: ready in 0:20",
        "first responses: starting",
    ]


def test_an_evaluation_of_a_single_policy_has_one_column() -> None:
    console = plain(80)
    View(console=console).evaluated({}, {"reward": 0.5})
    assert "Evaluation" in text(console)
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in text(console).splitlines() if "│" in line]
    assert rows == [["", ""], ["reward", "0.500"]]
    View(console=(other := plain(80))).evaluated({"reward": 0.0}, {"reward": 0.5}, stage="SFT")
    assert "Before and after SFT" in text(other)
