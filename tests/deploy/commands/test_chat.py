"""`antiphon chat`: prompts from stdin or an option, the newest policy, and how it ends."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.data.chat_settings import ChatSettings
from cluster.errors import InputError
from deploy.commands.policy import chat_session
from deploy.commands.policy.selection import selected_policy
from deploy.run.directory import RunDirectory
from deploy.run.layout import CONFIG
from rollout_actors.engine.protocol import SamplingRequest
from tests.support.chat import make_tokenizer
from tests.support.paths import ROOT


def write_policy(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    (tmp_path / CONFIG).write_text('[run]\nname = "r"\n[model]\npath = "m"\n[rollout_actors]\ntemperature = 0.5\n')
    write_policy(tmp_path / "sft")
    return RunDirectory(tmp_path)


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Calls of the engine: policy, prompts, seed and temperature."""
    calls: list[tuple[Any, ...]] = []

    def session(*_: Any) -> SimpleNamespace:
        async def rollout_actors(num: int, policy: Path) -> list[SimpleNamespace]:
            async def sample(prompts: Sequence[str], *, num: int, seed: str, temperature: float) -> list[list[Any]]:
                calls.append((str(policy.relative_to(tmp_path)), *prompts, seed, temperature))
                return [[SimpleNamespace(text=prompt.upper())] for prompt in prompts]

            async def complete(requests: Sequence[SamplingRequest], *, with_options: bool) -> list[list[int]]:
                tokenizer = make_tokenizer()
                calls.extend((tokenizer.decode(request.token_ids), request.max_tokens) for request in requests)
                return [tokenizer("ok<eos>", add_special_tokens=False)["input_ids"] for _ in requests]

            return [SimpleNamespace(sample=sample, complete=complete)]

        async def close() -> None:
            calls.append(("closed",))

        return SimpleNamespace(connect=lambda: None, rollout_actors=rollout_actors, close=close)

    monkeypatch.setattr(chat_session, "Session", session)
    return calls


def answer(run: RunDirectory, prompt: str | None, **choice: Any) -> None:
    with selected_policy(run.path, **choice) as policy:
        chat_session.answer_prompts(policy.config, policy.run, policy.folder, prompt)


@contextmanager
def typed(text: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    ours, theirs = os.pipe()
    os.write(theirs, text.encode())
    os.close(theirs)
    with os.fdopen(ours) as stdin, monkeypatch.context() as patched:
        patched.setattr(sys, "stdin", stdin)
        yield


def test_chat_answers_each_line_separately_until_an_empty_line(
    run: RunDirectory, asked: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with typed("one\ntwo\n\nthree\n", monkeypatch):
        answer(run, None)
    assert asked == [("sft", "one", "0-chat-0", 0.5), ("sft", "two", "0-chat-1", 0.5), ("closed",)]
    assert capsys.readouterr().out == "ONE\nTWO\n"


def test_chat_answers_only_the_prompt_option_if_given(
    run: RunDirectory, asked: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    answer(run, "one")
    assert asked == [("sft", "one", "0-chat-0", 0.5), ("closed",)]
    assert capsys.readouterr().out == "ONE\n"


def test_chat_uses_the_newest_checkpoint_until_ppo_is_done(run: RunDirectory, asked: list[Any]) -> None:
    (run.path / CONFIG).write_text((run.path / CONFIG).read_text() + "[learner]\nnum_steps = 4\n")
    checkpoints = run.path / "checkpoints" / "ppo"
    write_policy(checkpoints / "step-000002" / "policy")
    answer(run, "one")
    write_policy(checkpoints / "step-000004" / "policy")
    write_policy(run.path / "policy")
    answer(run, "one")
    used = [policy for policy, *call in asked if call]
    assert used == ["checkpoints/ppo/step-000002/policy", "policy"]


def test_chat_applies_the_chat_template_if_prompts_are_conversations(run: RunDirectory, asked: list[Any]) -> None:
    prompts = run.path / "prompts.jsonl"
    prompts.write_text('{"prompt": [{"role": "user", "content": "ab"}]}\n')
    (run.path / CONFIG).write_text((run.path / CONFIG).read_text() + f'[data]\nprompts = "{prompts}"\n')
    make_tokenizer().save_pretrained(run.path / "sft")
    answer(run, "one")
    assert asked[0][0] == "<bos>[user]one<eos>\n[assistant]"
    make_tokenizer(template=None).save_pretrained(run.path / "sft")
    (run.path / "sft" / "chat_template.jinja").unlink(missing_ok=True)
    with pytest.raises(InputError, match="has no chat template"):
        answer(run, "one")


CONVERSATION = "<bos>[system]s<eos>\n[user]one<eos>\n[assistant]"


def write_sft_run(run: RunDirectory, row: str, settings: str = "") -> None:
    """Make the run one that has only supervised examples, and write the tokenizer of its policy."""
    sft = run.path / "sft.jsonl"
    sft.write_text(row + "\n")
    (run.path / CONFIG).write_text((run.path / CONFIG).read_text() + f'[data]\nsft = "{sft}"\n{settings}\n')
    make_tokenizer().save_pretrained(run.path / "sft")


def test_chat_holds_a_conversation_in_a_run_with_sft_only(
    run: RunDirectory, asked: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_sft_run(run, '{"messages": [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "c"}]}')
    ChatSettings(system_prompt="s").write(run.path / "sft")
    with typed("one\ntwo\n/new\none\n", monkeypatch):
        answer(run, None)
    second = CONVERSATION + "ok<eos>\n[user]two<eos>\n[assistant]"
    assert [call[0] for call in asked] == [CONVERSATION, second, CONVERSATION, "closed"]
    assert capsys.readouterr().out == "ok\n" * 3


def test_chat_wraps_lines_if_texts_are_trained_as_messages(run: RunDirectory, asked: list[Any]) -> None:
    write_sft_run(run, '{"prompt": "ab", "completion": "c"}', "as_messages = true")
    answer(run, "one")
    assert asked[0][0] == "<bos>[user]one<eos>\n[assistant]"


def test_chat_starts_anew_if_the_conversation_is_full(
    run: RunDirectory, asked: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_sft_run(run, '{"prompt": "ab", "completion": "c"}', "as_messages = true")
    limits = "temperature = 0.5\nmax_prompt_tokens = 8\nmax_response_tokens = 6"
    (run.path / CONFIG).write_text((run.path / CONFIG).read_text().replace("temperature = 0.5", limits))
    with typed("one\ntwo\n", monkeypatch):
        answer(run, None)
    assert asked[:2] == [("<bos>[user]one<eos>\n[assistant]", 6), ("<bos>[user]two<eos>\n[assistant]", 6)]
    assert "this is a new one" in capsys.readouterr().err


def test_chat_fails_if_the_run_has_no_policy(run: RunDirectory) -> None:
    shutil.rmtree(run.path / "sft")
    with pytest.raises(InputError, match="has no policy yet"):
        answer(run, "one")


@pytest.mark.process
def test_an_interrupt_ends_the_wait_for_a_line() -> None:
    code = (
        "import asyncio\nfrom deploy.runtime.signals import interruptible\n"
        "from deploy.terminal.input import TypedLines\n"
        "async def wait():\n    lines = TypedLines()\n    print(await lines.next(), flush=True)\n"
        "    await lines.next()\nwith interruptible(): asyncio.run(wait())"
    )
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, text=True, **pipes) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("first\n")
        process.stdin.flush()
        assert process.stdout.readline() == "first\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) != 0
