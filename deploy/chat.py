"""Talk to the trained policy of a run, through a rollout actor's engine like all generation.

Each line is a prompt of its own; the policy gets it as it stands.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

from rich.console import Console

from cluster.errors import InputError
from deploy.boundary import interruptible
from deploy.run_config import read_run_config
from deploy.run_directory import CONFIG, RunDirectory
from deploy.session import Session
from deploy.typed_lines import TypedLines
from deploy.view import View


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


async def _chat(run: RunDirectory, policy: Path, prompts: AsyncIterator[str]) -> None:
    config = read_run_config(run.path / CONFIG)
    session = Session(config, run, View())
    session.connect()
    try:
        (actor, *_) = await session.rollout_actors(1, policy)
        turn = 0
        async for prompt in prompts:
            seed, temperature = f"{config.run.seed}-chat-{turn}", config.rollout_actors.temperature
            ((response,),) = await actor.sample([prompt], num=1, seed=seed, temperature=temperature)
            print(response.text, flush=True)
            turn += 1
    finally:
        await session.close()
