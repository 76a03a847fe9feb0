"""Answer prompts with the newest policy of a run, sampled by a rollout actor.

Each line is a separate prompt. If the run was trained on conversations, the prompt becomes the first user message of
one, in the chat template.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from rich.console import Console

from cluster.data.chat_template import render, require_template
from cluster.data.invalid_rows import BrokenRows
from deploy.config.load import read_run_config
from deploy.config.schema import RunConfig
from deploy.run.artifacts import data_path, newest_policy
from deploy.run.directory import RunDirectory
from deploy.run.layout import CONFIG
from deploy.runtime.session import Session
from deploy.runtime.signals import interruptible
from deploy.terminal.input import TypedLines
from deploy.terminal.view import View
from rollout_actors.prompts import PromptTokenizer, holds_messages, read_rows


def answer_prompts(run: RunDirectory, prompt: str | None) -> None:
    """Answer `prompt`, or every line of stdin. Raises InputError if the run has no policy yet."""
    config = read_run_config(run.path / CONFIG)
    policy = newest_policy(config, run).folder
    with interruptible():
        asyncio.run(_answer(config, run, policy, _single(prompt) if prompt else _lines()))


async def _single(prompt: str) -> AsyncIterator[str]:
    yield prompt


async def _lines() -> AsyncIterator[str]:
    """Yield prompts from stdin until an empty line or the end; prints `prompt> ` in a terminal."""
    lines, console = TypedLines(), Console(stderr=True)
    if lines.by_person:
        console.print("Type a prompt; an empty line exits.", style="dim")
    while True:
        if lines.by_person:
            console.print("prompt> ", style="bold", end="")
        line = await lines.next()
        if not line:
            return
        yield line


def _formatter(config: RunConfig, run: RunDirectory, policy: Path) -> Callable[[str], str]:
    """Return the function that turns a line into the policy's prompt."""
    if not any(_is_conversational(config, run, task) for task in config.by_task()):
        return str
    tokenizer = PromptTokenizer(str(policy), max_prompt_tokens=config.rollout_actors.max_prompt_tokens).tokenizer
    require_template(tokenizer, str(policy))
    return lambda line: render(tokenizer, [{"role": "user", "content": line}], "the prompt", is_prompt=True)


def _is_conversational(config: RunConfig, run: RunDirectory, task: str) -> bool:
    """Return whether a task's prompts are conversations; False if the data set no longer exists."""
    path, reading = data_path(config, run.path, "prompts", task), config.data.reading()
    if config.by_task()[task].environment.path is not None:
        return True
    return path.exists() and holds_messages(read_rows(path, reading, BrokenRows(reading.broken_rows)))


async def _answer(config: RunConfig, run: RunDirectory, policy: Path, prompts: AsyncIterator[str]) -> None:
    to_prompt = _formatter(config, run, policy)
    session = Session(config, run, View())
    session.connect()
    try:
        (actor, *_) = await session.rollout_actors(1, policy)
        turn = 0
        async for prompt in prompts:
            seed, temperature = f"{config.run.seed}-chat-{turn}", config.rollout_actors.temperature
            ((response,),) = await actor.sample([to_prompt(prompt)], num=1, seed=seed, temperature=temperature)
            print(response.text, flush=True)
            turn += 1
    finally:
        await session.close()
