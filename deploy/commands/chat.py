"""Talk to the trained policy of a run, through a rollout actor's engine like all generation.

Each line is a prompt of its own. A policy that was trained on conversations gets it as the first message of one, in its
chat template; another one as it stands.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from rich.console import Console

from cluster.data.broken_rows import BrokenRows
from cluster.data.chat_template import render, require_template
from cluster.errors import InputError
from deploy.config.load import read_run_config
from deploy.config.schema import RunConfig
from deploy.run.artifacts import data_path
from deploy.run.directory import RunDirectory
from deploy.run.layout import CONFIG
from deploy.runtime.session import Session
from deploy.runtime.signals import interruptible
from deploy.terminal.input import TypedLines
from deploy.terminal.view import View
from rollout_actors.prompts import PromptTokenizer, holds_messages, read_rows


def chat(run: RunDirectory, prompt: str | None) -> None:
    """Answer `prompt`, or every line typed until the end of input. Raises InputError before a policy is there."""
    policy = next((path for path in (run.path / "policy", run.path / "sft") if path.exists()), None)
    if policy is None:
        raise InputError(str(run.path), "has no policy yet (run antiphon train first)")
    with interruptible():
        asyncio.run(_chat(run, policy, _one(prompt) if prompt else _typed()))


async def _one(prompt: str) -> AsyncIterator[str]:
    yield prompt


async def _typed() -> AsyncIterator[str]:
    """Prompts from stdin up to an empty line or its end; a person is asked for each."""
    lines, console = TypedLines(), Console(stderr=True)
    if lines.by_person:
        console.print("Type a prompt; an empty line ends.", style="dim")
    while True:
        if lines.by_person:
            console.print("prompt> ", style="bold", end="")
        line = await lines.next()
        if not line:
            return
        yield line


def _asked(config: RunConfig, run: RunDirectory, policy: Path) -> Callable[[str], str]:
    """How a line becomes what the policy is asked."""
    if not any(_is_conversational(config, run, task) for task in config.by_task()):
        return str
    tokenizer = PromptTokenizer(str(policy), max_prompt_tokens=config.rollout_actors.max_prompt_tokens).tokenizer
    require_template(tokenizer, str(policy))
    return lambda line: render(tokenizer, [{"role": "user", "content": line}], "the prompt", is_prompt=True)


def _is_conversational(config: RunConfig, run: RunDirectory, task: str) -> bool:
    """Whether a task's prompts are conversations; no where they are gone."""
    path, reading = data_path(config, run.path, "prompts", task), config.data.reading()
    if config.by_task()[task].environment.path is not None:
        return True
    return path.exists() and holds_messages(read_rows(path, reading, BrokenRows(reading.broken_rows)))


async def _chat(run: RunDirectory, policy: Path, prompts: AsyncIterator[str]) -> None:
    config = read_run_config(run.path / CONFIG)
    asked = _asked(config, run, policy)
    session = Session(config, run, View())
    session.connect()
    try:
        (actor, *_) = await session.rollout_actors(1, policy)
        turn = 0
        async for prompt in prompts:
            seed, temperature = f"{config.run.seed}-chat-{turn}", config.rollout_actors.temperature
            ((response,),) = await actor.sample([asked(prompt)], num=1, seed=seed, temperature=temperature)
            print(response.text, flush=True)
            turn += 1
    finally:
        await session.close()
