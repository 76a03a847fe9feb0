"""`antiphon play`: a person is the policy in an environment, turn by turn, in the terminal or from a pipe.

Runs the environment as a rollout actor does, with its deadlines and its most turns; loads no model and starts no Ray.
Knows no tokens, so `environment.max_tokens` ends nothing here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from cluster.data.broken_rows import BrokenRows
from cluster.errors import EnvironmentFault, InputError
from deploy.config.schema import RunConfig
from deploy.runtime.signals import interruptible
from deploy.terminal.input import TypedLines
from deploy.terminal.text import visible
from rollout_actors.config import EnvironmentConfig
from rollout_actors.environments.host import Host
from rollout_actors.environments.pool import Environments
from rollout_actors.environments.protocol import Observation, Step
from rollout_actors.prompts import read_rows, scorer_columns

Answer = Callable[[], Awaitable[str | None]]
"""The person's next answer; None where there is none any more."""


def play(config: RunConfig, run_path: Path, *, task: str | None, seed: int) -> None:
    """Hold one conversation in a task's environment, by default in the only one.

    Raises InputError without an environment, EnvironmentFault where that is at fault.
    """
    name = _chosen(config, task)
    columns = _columns(config, run_path, name, seed)
    console = Console(highlight=False, markup=False, emoji=False)
    game = Game(config.by_task()[name].environment, console, _typed(console))
    with interruptible():
        try:
            asyncio.run(game.play(seed, columns))
        finally:
            game.print_end()


def _chosen(config: RunConfig, task: str | None) -> str:
    """The task whose environment is played in."""
    names = [name for name, each in config.by_task().items() if each.environment.path is not None]
    if not names:
        raise InputError("environment.path", "is not set: there is no environment to play in")
    if task is None and len(names) > 1:
        raise InputError("--task", f"name the one to play in: {', '.join(names)}")
    if task is not None and task not in names:
        raise InputError("--task", f"no task {task!r} has an environment; there is {', '.join(filter(None, names))}")
    return names[0] if task is None else task


def _columns(config: RunConfig, run_path: Path, task: str, seed: int) -> dict[str, Any]:
    """Those of the prompt's row that the seed is the place of; none where the prompts come from the environment."""
    built = run_path / "data" / task / "prompts.parquet"
    path = config.by_task()[task].prompts or (built if built.exists() else None)
    if path is None:
        return {}
    reading = config.data.reading()
    rows = read_rows(path, reading, BrokenRows(reading.broken_rows))
    return scorer_columns(rows[seed % len(rows)])


def _typed(console: Console) -> Answer:
    """What a person is asked for line by line, or a pipe gives, which is then shown."""
    lines = TypedLines()

    async def answer() -> str | None:
        if lines.by_person:
            console.print("answer> ", style="bold", end="")
        text = await lines.next()
        if text is not None and not lines.by_person:
            console.print(_said("assistant", text), soft_wrap=True)
        return text

    return answer


@dataclass
class Game:
    """One conversation with an environment, and what it has come to."""

    config: EnvironmentConfig
    console: Console
    answer: Answer
    num_turns: int = 0
    total: float = 0.0
    parts: dict[str, float] = field(default_factory=dict)
    ended: str = ""
    """Why; nothing before it has begun."""

    async def play(self, seed: int, columns: Mapping[str, Any]) -> None:
        """From the environment's beginning to whatever ends it."""
        environments = Environments(self.config)
        try:
            async with environments.one() as host:
                start, tools = await host.reset(seed, columns), await host.tools()
                self.ended = "interrupted"
                self._say(start)
                self._list(tools)
                self.ended = await self._turns(host)
        except EnvironmentFault:
            self.ended = self.ended and "the environment is at fault"
            raise
        finally:
            await environments.close()

    async def _turns(self, host: Host) -> str:
        """Turn after turn; why it ended."""
        while (text := await self.answer()) is not None:
            step = await host.step(text)
            self._take(step)
            if step.terminated:
                return "the environment ended it"
            if step.truncated:
                return "the environment cut it off"
            if self.num_turns == self.config.max_turns:
                return f"environment.max_turns = {self.config.max_turns}"
        return "no more answers"

    def _take(self, step: Step) -> None:
        self.num_turns += 1
        self.total += step.reward
        self.parts |= step.info
        self.console.print(f"reward {step.reward:g}", style="cyan")
        self._say(step.observation)

    def _say(self, observation: Observation) -> None:
        said = [{"role": "user", "content": observation}] if isinstance(observation, str) else observation
        for message in said:
            if message["content"]:
                self.console.print(_said(message["role"], message["content"]), soft_wrap=True)

    def _list(self, schemas: Sequence[Mapping[str, Any]]) -> None:
        """The functions that an answer may call, and how."""
        if not schemas:
            return
        self.console.print('tools, called by {"name": ..., "arguments": {...}}:', style="dim")
        for function in (schema["function"] for schema in schemas):
            arguments = ", ".join(function.get("parameters", {}).get("properties", {}))
            line = f"  {function['name']}({arguments}): {function.get('description', '')}"
            self.console.print(visible(line), style="dim", soft_wrap=True)

    def print_end(self) -> None:
        """Why it ended, and what it was worth; nothing where it has not begun."""
        if not self.ended:
            return
        turns = f"{self.num_turns} turn{'' if self.num_turns == 1 else 's'}"
        self.console.print(f"\nended: {self.ended}\ntotal reward {self.total:g} in {turns}", style="bold")
        for name, value in self.parts.items():
            self.console.print(visible(f"  {name} {value:g}"), soft_wrap=True)


def _said(role: str, content: str) -> Text:
    return Text.assemble((f"{visible(role)}: ", "dim"), visible(content))
