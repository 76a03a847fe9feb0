"""Show the progress of a run on stderr: live in a terminal, otherwise a line every few seconds."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from cluster.metrics import METRICS
from deploy.terminal.text import number, visible

PLAIN_EVERY_S = 5.0
SPARKS = "▁▂▃▄▅▆▇█"
NUM_SPARKS = 24
LABELS = {"kl_nats": "KL (nats)", "reward_mean": "reward"}
_TABLE: Any = {"title_justify": "left", "title_style": "bold", "header_style": "dim", "box": box.ROUNDED}
Metrics = Mapping[str, float | None]
FIGURES: dict[str, str] = {
    "learner/reward_mean": "reward",
    "learner/kl_nats": "KL",
    "learner/cost_mean": "cost",
    "learner/constraint_multiplier": "multiplier",
    "rollout_actors/response_length_tokens": "length",
    "cluster/policy_lag_mean": "lag",
    "cluster/policy_lag_max": "max lag",
    "rollout_actors/tokens_per_s": "",
    "loss": "loss",
    "accuracy": "accuracy",
    "rewards/margins": "margin",
    "tokens_per_s": "",
}
"""Metrics that the view shows, in this order, with their labels."""


@dataclass
class _Stage:
    """The progress of one stage; `total` is 0 if the number of steps is unknown."""

    name: str
    total: int
    started: float
    step: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    rewards: deque[float] = field(default_factory=lambda: deque(maxlen=NUM_SPARKS))
    arrivals: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=30))
    ended: float | None = None

    def advance(self, metrics: Metrics, now: float) -> None:
        self.metrics.update({key: value for key, value in metrics.items() if isinstance(value, int | float)})
        self.step = int(metrics.get("step") or self.step + 1)
        self.arrivals.append((now, self.step))
        reward = metrics.get("learner/reward_mean")
        if reward is not None:
            self.rewards.append(reward)

    def left_s(self, now: float) -> float | None:
        """Return the remaining seconds at the pace of the last steps, or None if the pace is unknown."""
        (first, first_step), (last, last_step) = self.arrivals[0], self.arrivals[-1]
        if not self.total or last_step <= first_step:
            return None
        pace_s = (last - first) / (last_step - first_step)
        return max(0.0, (self.total - self.step) * pace_s - (now - last))

    def position(self) -> str:
        return f"{self.step:,} of {self.total:,}" if self.total else f"{self.step:,}"


class View:
    """Draws the stages of a run inside its context; outside of it, only notes and tables are printed."""

    def __init__(
        self, title: str = "", console: Console | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._title = title
        self._console = console or Console(stderr=True, highlight=False)
        self._clock = clock
        self._stages: list[_Stage] = []
        self._starting: dict[str, float] = {}
        self._ready: dict[str, float] = {}
        self._live: Live | None = None
        self._printed_at = float("-inf")

    def __enter__(self) -> View:
        if self._console.is_interactive:
            self._live = Live(
                console=self._console, get_renderable=self.display, refresh_per_second=4, vertical_overflow="visible"
            )
            self._live.start()
        elif self._title:
            self._line(self._title)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._end_stage(done=kind is None)
        self._stop_live()

    def _stop_live(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def stage(self, name: str, total_steps: int) -> None:
        """Begin a stage and mark the one before it as done.

        `total_steps` is 0 if the number of steps is unknown.
        """
        self._end_stage(done=True)
        self._stages.append(_Stage(name, total_steps, self._clock()))
        self._printed_at = float("-inf")
        if self._live is None:
            self._line(f"{name}: starting")

    def expect(self, total_steps: int) -> None:
        """Set the number of steps of the current stage once it is known."""
        if self._stages:
            self._stages[-1].total = total_steps

    def _end_stage(self, *, done: bool) -> None:
        if self._stages and self._stages[-1].ended is None and done:
            stage = self._stages[-1]
            stage.ended = self._clock()
            if self._live is None:
                self._line(f"{stage.name}: done in {_duration(stage.ended - stage.started)}")

    @contextlib.contextmanager
    def starting(self, part: str) -> Iterator[None]:
        """Show that a part is starting, and how long it took, until the first step of a stage."""
        self.wait_for(part)
        yield
        started = self._starting.pop(part, self._clock())
        self._ready[part] = self._clock() - started
        if self._live is None:
            self._line(f"{part}: ready in {_duration(self._ready[part])}")

    def wait_for(self, part: str) -> None:
        """Show that the next step waits for a part."""
        self._starting[part] = self._clock()
        if self._live is None:
            self._line(f"{part}: starting")

    def step(self, metrics: Metrics) -> None:
        """Show a finished step of the current stage; `metrics` are its row, with the step's number as `step`."""
        self._starting.clear()
        self._ready.clear()
        if not self._stages:
            return
        stage, now = self._stages[-1], self._clock()
        stage.advance(metrics, now)
        last = stage.step == stage.total
        if self._live is None and (last or now - self._printed_at >= PLAIN_EVERY_S):
            self._printed_at = now
            parts = [f"{stage.name} {stage.position()}", *_figures(stage)]
            left_s = stage.left_s(now)
            if left_s is not None and not last:
                parts.append(f"{_duration(left_s)} left")
            self._line("  ".join(parts))

    def note(self, text: str) -> None:
        """Print a note on a separate line."""
        self._line(text)

    def _line(self, text: str) -> None:
        self._console.print(escape(text), soft_wrap=True)

    def display(self) -> RenderableType:
        """Return the current contents of the live display."""
        rows: list[RenderableType] = [Text(self._title, style="bold")] if self._title else []
        for stage in self._stages:
            rows.append(_done(stage) if stage.ended is not None else self._current(stage))
        width = self._console.width - 3
        rows += [Text(f"   {line}", style="dim") for line in _lines(self._waits(), width)]
        return Group(*rows)

    def _waits(self) -> list[str]:
        """Return what the first step waits for and what is ready, with the seconds of each."""
        now = self._clock()
        waits = [f"{part}: starting {_duration(now - started)}" for part, started in self._starting.items()]
        return waits + [f"{part}: ready {_duration(seconds)}" for part, seconds in self._ready.items()]

    def _current(self, stage: _Stage) -> RenderableType:
        now = self._clock()
        left_s = stage.left_s(now) if stage.arrivals else None
        waiting = f"{_duration(left_s)} left" if left_s is not None else _duration(now - stage.started)
        bar = ProgressBar(
            total=stage.total or None, completed=stage.step, width=32, pulse=not stage.step, animation_time=now
        )
        head = Table.grid(padding=(0, 2))
        head.add_row(Text("●", style="cyan"), Text(f"{stage.name:<12}", style="bold"), bar, stage.position(), waiting)
        parts = _figures(stage)
        if len(stage.rewards) > 1:
            parts.insert(0, _sparks(stage.rewards))
        return Group(head, *(Text(f"   {line}") for line in _lines(parts, self._console.width - 3)))

    def evaluated(
        self, before: Mapping[str, Any], after: Mapping[str, Any], *, task: str = "", stage: str = "PPO"
    ) -> None:
        """Print the evaluations of summary.json: of the run and each of its tasks, or only of `task`.

        `stage` is what was trained between the two; without `before`, the evaluation of a single policy.
        """
        by_task = {name: (before.get("tasks", {}).get(name, {}), own) for name, own in after.get("tasks", {}).items()}
        for name, tables in by_task.items() if task else [("", (before, after)), *by_task.items()]:
            if task in ("", name):
                old, new = ({key: value for key, value in own.items() if key != "tasks"} for own in tables)
                self.table_before_after(old, new, task=name, stage=stage if before else "")

    def table_before_after(
        self, before: Mapping[str, float], after: Mapping[str, float], *, task: str = "", stage: str = "PPO"
    ) -> None:
        """Print a table of the metrics before and after a stage, of one task if given; ends the live display.

        Without a stage, there is only a column of the metrics.
        """
        self._end_stage(done=True)
        self._stop_live()
        title = f"before and after {stage}" if stage else "evaluation"
        table = Table(title=f"{task}: {title}" if task else title[0].upper() + title[1:], **_TABLE)
        table.add_column("")
        for heading in ("before", "after", "change") if stage else ("",):
            table.add_column(heading, justify="right")
        for key in dict.fromkeys([*before, *after]):
            old, new = before.get(key), after.get(key)
            change = f"{new - old:+.3f}" if old is not None and new is not None else ""
            cells = (number(old, ".3f"), number(new, ".3f"), change) if stage else (number(new, ".3f"),)
            table.add_row(LABELS.get(key, key), *cells)
        self._console.print()
        self._console.print(table)

    def responses(self, prompts: Sequence[str], before: Sequence[str], after: Sequence[str]) -> None:
        """Print responses of both policies to the same prompts side by side."""
        self._end_stage(done=True)
        self._stop_live()
        table = Table(title="Responses to read", show_lines=True, **_TABLE)
        for heading, ratio in (("prompt", 2), ("before", 3), ("after", 3)):
            table.add_column(heading, ratio=ratio, overflow="fold")
        for row in zip(prompts, before, after, strict=True):
            table.add_row(*(Text(visible(text.strip()) or "(empty)") for text in row))
        self._console.print()
        self._console.print(table)

    def regressions(self, worse: Sequence[Any]) -> None:
        """Print prompts whose answers became worse, with both answers and their rewards."""
        if not worse:
            return
        table = Table(title="Worse than before", show_lines=True, **_TABLE)
        for heading, ratio in (("prompt", 2), ("before", 3), ("after", 3)):
            table.add_column(heading, ratio=ratio, overflow="fold")
        for one in worse:
            texts = (f"{one.reward_before:.3f}  {one.before}", f"{one.reward_after:.3f}  {one.after}")
            table.add_row(*(Text(visible(text.strip())) for text in (one.prompt, *texts)))
        self._console.print(table)


def _done(stage: _Stage) -> RenderableType:
    row = Table.grid(padding=(0, 2))
    took = _duration((stage.ended or stage.started) - stage.started)
    figures = Text("  ".join(_figures(stage)[:3]), "dim")
    row.add_row(Text("✓", style="green"), f"{stage.name:<12}", f"{took:>6}", f"{stage.step:>6,} done", figures)
    return row


def _figures(stage: _Stage) -> list[str]:
    shown = {key: label for key, label in FIGURES.items() if key in stage.metrics}
    return [f"{label} {METRICS[key].format.format(stage.metrics[key])}".strip() for key, label in shown.items()]


def _lines(parts: Sequence[str], width: int) -> list[str]:
    """Join parts into lines of at most `width` characters, breaking only between parts."""
    lines: list[str] = []
    for part in parts:
        if lines and len(lines[-1]) + 2 + len(part) <= width:
            lines[-1] += f"  {part}"
        else:
            lines.append(part)
    return lines


def _sparks(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    scale = (len(SPARKS) - 1) / (high - low) if high > low else 0.0
    return "".join(SPARKS[round((value - low) * scale)] for value in values)


def _duration(seconds: float) -> str:
    minutes, whole = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{whole:02}" if hours else f"{minutes}:{whole:02}"
