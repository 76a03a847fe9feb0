"""Talk to the trained policy of a run, through a rollout actor's engine like all generation.

Each line is a prompt of its own; the policy gets it as it stands.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from cluster.errors import InputError
from deploy.run_config import read_run_config
from deploy.run_directory import CONFIG, RunDirectory
from deploy.session import Session
from deploy.view import View


def chat(run: RunDirectory, prompt: str | None) -> None:
    """Answer `prompt`, or every line typed until the end of input. Raises InputError before a policy is there."""
    policy = next((path for path in (run.path / "policy", run.path / "sft") if path.exists()), None)
    if policy is None:
        raise InputError(str(run.path), "has no policy yet (run antiphon train first)")
    asyncio.run(_chat(run, policy, [prompt] if prompt else _typed_lines()))


def _typed_lines() -> Iterator[str]:
    console = Console(stderr=True)
    console.print("Type a prompt; an empty line ends.", style="dim")
    while True:
        try:
            line = console.input("[bold]prompt> [/bold]")
        except EOFError:
            return
        if not line:
            return
        yield line


async def _chat(run: RunDirectory, policy: Path, prompts: list[str] | Iterator[str]) -> None:
    config = read_run_config(run.path / CONFIG)
    session = Session(config, run, View())
    session.connect()
    try:
        (actor, *_) = await session.rollout_actors(1, policy)
        iterator = iter(prompts)
        for turn in itertools.count():
            prompt = await asyncio.to_thread(next, iterator, None)
            if prompt is None:
                return
            ((response,),) = await actor.sample(
                [prompt],
                num=1,
                seed=f"{config.run.seed}-chat-{turn}",
                temperature=config.rollout_actors.temperature,
            )
            print(response.text, flush=True)
    finally:
        await session.close()
