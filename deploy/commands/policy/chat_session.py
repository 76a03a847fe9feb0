"""Answer prompts with the newest policy of a run, sampled by a rollout actor.

If the policy was trained on conversations, the lines are the user's messages of one, in the chat template, with the
run's system prompt. Otherwise each line is a separate prompt.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

from rich.console import Console

from cluster.actors.remote import RemoteActor
from deploy.commands.policy.conversation import ChatConversation
from deploy.config.chat import folder_template
from deploy.config.schema import RunConfig
from deploy.data.forms import is_conversational
from deploy.run.directory import RunDirectory
from deploy.runtime.session import Session
from deploy.runtime.signals import interruptible
from deploy.terminal.input import TypedLines
from deploy.terminal.view import View

NEW = "/new"
"""The line that starts a new conversation."""


def answer_prompts(config: RunConfig, run: RunDirectory, policy: Path, prompt: str | None) -> None:
    """Answer `prompt`, or every line of stdin, by the policy in a folder."""
    with interruptible():
        asyncio.run(_answer(config, run, policy, _single(prompt) if prompt else _lines()))


async def _single(prompt: str) -> AsyncIterator[str]:
    yield prompt


async def _lines() -> AsyncIterator[str]:
    """Yield prompts from stdin until an empty line or the end; prints `prompt> ` in a terminal."""
    lines, console = TypedLines(), Console(stderr=True)
    if lines.by_person:
        console.print(f"Type a prompt; {NEW} starts a new conversation, an empty line exits.", style="dim")
    while True:
        if lines.by_person:
            console.print("prompt> ", style="bold", end="")
        line = await lines.next()
        if not line:
            return
        yield line


def _conversation(config: RunConfig, run: RunDirectory, policy: Path) -> ChatConversation | None:
    """Return the conversation to be held, or None if the policy was trained on texts without a chat template."""
    has_template = folder_template(policy) is not None
    for name, task in config.by_task().items():
        found = is_conversational(config, run.path, name)
        if found or (has_template and (found is None or task.environment.path is not None)):
            return ChatConversation(config, policy)
    return None


async def _answer(config: RunConfig, run: RunDirectory, policy: Path, prompts: AsyncIterator[str]) -> None:
    conversation = _conversation(config, run, policy)
    session = Session(config, run, View())
    session.connect()
    try:
        (actor, *_) = await session.rollout_actors(1, policy)
        turn = 0
        async for prompt in prompts:
            if prompt == NEW and conversation is not None:
                conversation.forget()
                continue
            seed = f"{config.run.seed}-chat-{turn}"
            print(await _said(actor, config, conversation, prompt, seed), flush=True)
            turn += 1
    finally:
        await session.close()


async def _said(
    actor: RemoteActor, config: RunConfig, conversation: ChatConversation | None, prompt: str, seed: str
) -> str:
    """Return the policy's answer to a line: in the conversation, or to the line as a prompt of its own."""
    if conversation is not None:
        if conversation.say(prompt):
            Console(stderr=True).print("The conversation was full; this is a new one.", style="dim")
        return await conversation.answer(actor, seed)
    temperature = config.rollout_actors.temperature
    ((response,),) = await actor.sample([prompt], num=1, seed=seed, temperature=temperature)
    text: str = response.text
    return text
