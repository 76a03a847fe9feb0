"""`antiphon chat`: line by line to the newest policy, and what ends it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.data.chat_template import RenderedPrompt
from cluster.errors import InputError
from deploy.commands import chat as chatting
from deploy.run.directory import RunDirectory
from deploy.run.layout import CONFIG
from tests.support.chat import make_tokenizer
from tests.support.paths import ROOT


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    (tmp_path / CONFIG).write_text('[run]\nname = "r"\n[model]\npath = "m"\n[rollout_actors]\ntemperature = 0.5\n')
    (tmp_path / "sft").mkdir()
    return RunDirectory(tmp_path)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What the engine was asked: policy, prompts, seed and temperature."""
    calls: list[tuple[Any, ...]] = []

    def session(*_: Any) -> SimpleNamespace:
        async def rollout_actors(num: int, policy: Path) -> list[SimpleNamespace]:
            async def sample(prompts: Sequence[str], *, num: int, seed: str, temperature: float) -> list[list[Any]]:
                calls.append((policy.name, *prompts, seed, temperature))
                return [[SimpleNamespace(text=prompt.upper())] for prompt in prompts]

            return [SimpleNamespace(sample=sample)]

        async def close() -> None:
            calls.append(("closed",))

        return SimpleNamespace(connect=lambda: None, rollout_actors=rollout_actors, close=close)

    monkeypatch.setattr(chatting, "Session", session)
    return calls


@contextmanager
def typed(text: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    ours, theirs = os.pipe()
    os.write(theirs, text.encode())
    os.close(theirs)
    with os.fdopen(ours) as stdin, monkeypatch.context() as patched:
        patched.setattr(sys, "stdin", stdin)
        yield


def test_every_line_up_to_an_empty_one_is_a_prompt_of_its_own(
    run: RunDirectory, asked: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with typed("one\ntwo\n\nthree\n", monkeypatch):
        chatting.chat(run, None)
    assert asked == [("sft", "one", "0-chat-0", 0.5), ("sft", "two", "0-chat-1", 0.5), ("closed",)]
    assert capsys.readouterr().out == "ONE\nTWO\n"


def test_a_prompt_that_is_given_is_the_only_one_and_the_newest_policy_answers(
    run: RunDirectory, asked: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    (run.path / "policy").mkdir()
    chatting.chat(run, "one")
    assert asked == [("policy", "one", "0-chat-0", 0.5), ("closed",)]
    assert capsys.readouterr().out == "ONE\n"


def test_a_policy_that_was_trained_on_conversations_is_asked_in_its_chat_template(
    run: RunDirectory, asked: list[Any]
) -> None:
    prompts = run.path / "prompts.jsonl"
    prompts.write_text('{"prompt": [{"role": "user", "content": "ab"}]}\n')
    (run.path / CONFIG).write_text((run.path / CONFIG).read_text() + f'[data]\nprompts = "{prompts}"\n')
    make_tokenizer().save_pretrained(run.path / "sft")
    chatting.chat(run, "one")
    assert asked[0][1] == "<bos>[user]one<eos>\n[assistant]"
    assert isinstance(asked[0][1], RenderedPrompt)
    make_tokenizer(template=None).save_pretrained(run.path / "policy")
    with pytest.raises(InputError, match="has no chat template"):
        chatting.chat(run, "one")


def test_a_run_without_a_policy_is_refused(run: RunDirectory) -> None:
    (run.path / "sft").rmdir()
    with pytest.raises(InputError, match="has no policy yet"):
        chatting.chat(run, "one")


def test_an_interrupt_ends_the_wait_for_a_line() -> None:
    code = (
        "import asyncio\nfrom deploy.runtime.signals import interruptible\n"
        "from deploy.terminal.input import TypedLines\n"
        "async def wait():\n    lines = TypedLines()\n    print(await lines.next(), flush=True)\n"
        "    await lines.next()\nwith interruptible(): asyncio.run(wait())"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, text=True, **pipes) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("first\n")
        process.stdin.flush()
        assert process.stdout.readline() == "first\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) != 0
