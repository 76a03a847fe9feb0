"""`antiphon play`: answer a task's environment in place of the policy, from the terminal or a pipe.

Runs the environment as a rollout actor does, with the same deadlines and the same limit on turns; loads no model and
starts no Ray. Responses are not tokenized, so `environment.max_tokens` has no effect.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from cluster.data.invalid_rows import BrokenRows
from cluster.errors import EnvironmentFault, InputError
from deploy.commands.arguments import Lines, Target
from deploy.config.schema import RunConfig
from deploy.run.open import read_target
from deploy.runtime.signals import interruptible
from deploy.terminal.input import TypedLines
from deploy.terminal.text import visible
from rollout_actors.config import EnvironmentConfig
from rollout_actors.environments.host import Host
from rollout_actors.environments.pool import EnvironmentPool
from rollout_actors.environments.protocol import Observation, Step
from rollout_actors.prompts import read_rows, scorer_columns

Answer = Callable[[], Awaitable[str | None]]
"""Returns the next response; None at the end of the input."""


def play(
    target: Target,
    seed: Annotated[
        int, typer.Option(min=0, help="Seed of the environment; also selects the row if there are prompts.")
    ] = 0,
    task: Annotated[str | None, typer.Option(metavar="NAME", help="Task to play, if several have one.")] = None,
    set_: Lines = None,
) -> None:
    """Answer a task's environment turn by turn in place of the policy, in the terminal or from stdin.

    [dim]antiphon play examples/game/run.toml --seed 3[/dim]
    """
    config, path = read_target(target, set_ or ())
    play_conversation(config, path, task=task, seed=seed)


def play_conversation(config: RunConfig, run_path: Path, *, task: str | None, seed: int) -> None:
    """Run one conversation with the environment of `task`, by default the only task that has one.

    Raises InputError if there is no environment, and EnvironmentFault if it fails.
    """
    name = _task_to_play(config, task)
    columns = _columns(config, run_path, name, seed)
    console = Console(highlight=False, markup=False, emoji=False)
    game = Game(config.by_task()[name].environment, console, _reader(console))
    with interruptible():
        try:
            asyncio.run(game.play(seed, columns))
        finally:
            game.print_end()


def _task_to_play(config: RunConfig, task: str | None) -> str:
    """Return the name of the task to play.

    Raises InputError if none has an environment or the name is ambiguous.
    """
    names = [name for name, each in config.by_task().items() if each.environment.path is not None]
    if not names:
        raise InputError("environment.path", "is not set; antiphon play needs an environment")
    if task is None and len(names) > 1:
        raise InputError("--task", f"several tasks have an environment; choose one of {', '.join(names)}")
    if task is not None and task not in names:
        known = ", ".join(filter(None, names)) or "none"
        raise InputError("--task", f"no task {task!r} has an environment; tasks with one: {known}")
    return names[0] if task is None else task


def _columns(config: RunConfig, run_path: Path, task: str, seed: int) -> dict[str, Any]:
    """Return the columns of prompt row `seed` modulo the number of rows; none without prompts."""
    built = run_path / "data" / task / "prompts.parquet"
    path = config.by_task()[task].prompts or (built if built.exists() else None)
    if path is None:
        return {}
    reading = config.data.reading()
    rows = read_rows(path, reading, BrokenRows(reading.broken_rows))
    return scorer_columns(rows[seed % len(rows)])


def _reader(console: Console) -> Answer:
    """Return a function that asks a person for a line, or reads a line of a pipe and prints it."""
    lines = TypedLines()

    async def answer() -> str | None:
        if lines.by_person:
            console.print("answer> ", style="bold", end="")
        text = await lines.next()
        if text is not None and not lines.by_person:
            console.print(_message("assistant", text), soft_wrap=True)
        return text

    return answer


@dataclass
class Game:
    """Runs one conversation with an environment and sums its rewards."""

    config: EnvironmentConfig
    console: Console
    answer: Answer
    num_turns: int = 0
    total: float = 0.0
    parts: dict[str, float] = field(default_factory=dict)
    ended: str = ""
    """Why the conversation ended; empty until it has begun."""

    async def play(self, seed: int, columns: Mapping[str, Any]) -> None:
        """Run the conversation from `reset` to its end. Raises EnvironmentFault if the environment fails."""
        environments = EnvironmentPool(self.config)
        try:
            async with environments.acquire() as host:
                start, tools = await host.reset(seed, columns), await host.tools()
                self.ended = "interrupted"
                self._print_observation(start)
                self._print_tools(tools)
                self.ended = await self._turns(host)
        except EnvironmentFault:
            self.ended = self.ended and "the environment failed"
            raise
        finally:
            await environments.close()

    async def _turns(self, host: Host) -> str:
        """Exchange turns until the end; returns why the conversation ended."""
        while (text := await self.answer()) is not None:
            step = await host.step(text)
            self._add(step)
            if step.terminated:
                return "the environment ended it"
            if step.truncated:
                return "the environment truncated it"
            if self.num_turns == self.config.max_turns:
                return f"environment.max_turns = {self.config.max_turns}"
        return "no more input"

    def _add(self, step: Step) -> None:
        self.num_turns += 1
        self.total += step.reward
        self.parts |= step.info
        self.console.print(f"reward {step.reward:g}", style="cyan")
        self._print_observation(step.observation)

    def _print_observation(self, observation: Observation) -> None:
        messages = [{"role": "user", "content": observation}] if isinstance(observation, str) else observation
        for message in messages:
            if message["content"]:
                self.console.print(_message(message["role"], message["content"]), soft_wrap=True)

    def _print_tools(self, schemas: Sequence[Mapping[str, Any]]) -> None:
        """List the functions that a response may call."""
        if not schemas:
            return
        self.console.print('tools, called by {"name": ..., "arguments": {...}}:', style="dim")
        for function in (schema["function"] for schema in schemas):
            arguments = ", ".join(function.get("parameters", {}).get("properties", {}))
            line = f"  {function['name']}({arguments}): {function.get('description', '')}"
            self.console.print(visible(line), style="dim", soft_wrap=True)

    def print_end(self) -> None:
        """Print why the conversation ended and its total reward; prints nothing if it has not begun."""
        if not self.ended:
            return
        turns = f"{self.num_turns} turn{'' if self.num_turns == 1 else 's'}"
        self.console.print(f"\nended: {self.ended}\ntotal reward {self.total:g} in {turns}", style="bold")
        for name, value in self.parts.items():
            self.console.print(visible(f"  {name} {value:g}"), soft_wrap=True)


def _message(role: str, content: str) -> Text:
    return Text.assemble((f"{visible(role)}: ", "dim"), visible(content))
