"""Tests of histories rendered anew, of calls in history, and of kept conversations with a date in the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from cluster.data.chat_template import Message
from cluster.errors import EnvironmentFault
from cluster.trajectory import PartialResponse, Trajectory
from rollout_actors.conversations.conversation import Conversation
from rollout_actors.conversations.dialogue import ProgressSaver
from rollout_actors.conversations.history import assistant_message, differ_by_date
from rollout_actors.prompts import PromptTokenizer
from rollout_actors.tool_calls import ParsedResponse, ToolCall
from tests.rollout_actors.conversations.test_dialogue import EOS, converse
from tests.support import environments
from tests.support.chat import TEMPLATE, make_tokenizer

WITHOUT_THOUGHTS = TEMPLATE.replace(
    "{{ m['content'] | trim }}",
    "{{ (m['content'].split('!')[-1] if m['role'] == 'assistant' else m['content']) | trim }}",
)
"""Leaves out what stands before an exclamation mark in earlier answers, as templates of reasoning models do."""
DATED = "{{ strftime_now('%d %b %Y') }}" + TEMPLATE
TEXTS = ("ab!x", "cd!y", "ef!z")
REDATED = ("01 Jan 2020", "31 Dec 1999")


def saved_tokenizer(folder: Path, template: str) -> PromptTokenizer:
    make_tokenizer(template).save_pretrained(folder)
    return PromptTokenizer(str(folder), max_prompt_tokens=32)


@pytest.fixture
def thinker(tmp_path: Path) -> PromptTokenizer:
    return saved_tokenizer(tmp_path / "thinker", WITHOUT_THOUGHTS)


def prompt_ids(tokenizer: PromptTokenizer, messages: Sequence[Message]) -> list[int]:
    ids: list[int] = tokenizer.tokenizer.apply_chat_template(
        list(messages), tokenize=True, add_generation_prompt=True, return_dict=False
    )
    return ids


def trajectory_of(conversation: Conversation) -> Trajectory:
    return Trajectory(
        uid=conversation.uid,
        group=0,
        task="t",
        token_ids=conversation.token_ids,
        mask=conversation.mask,
        behavior_logprobs=conversation.logprobs,
        segments=conversation.segments,
        turns=conversation.turns,
        admission_index=0,
        finish_reason=conversation.finish_reason,
        sequence_starts=conversation.sequence_starts,
    ).check()


async def test_every_turn_is_sampled_after_the_history_as_the_template_writes_it(thinker: PromptTokenizer) -> None:
    conversation, script = await converse(thinker, environments.Echo(num_turns=3), *TEXTS, history="as_rendered")
    prompts = [prompt_ids(thinker, conversation.messages[:num]) for num in (1, 3, 5)]
    assert [ids for ids, _, _ in script.requests] == prompts
    sampled = [[*thinker.encode_part(text), EOS] for text in TEXTS]
    assert conversation.sequences == [[*prompt, *own] for prompt, own in zip(prompts, sampled, strict=True)]
    assert "!" not in thinker.tokenizer.decode(prompts[2]), "thoughts are left out"
    trajectory = trajectory_of(conversation)
    assert [trajectory.tokens_before(turn.start) for turn in trajectory.turns] == prompts
    assert [t for t, is_sampled in zip(conversation.token_ids, conversation.mask, strict=True) if is_sampled] == [
        token for own in sampled for token in own
    ], "the stop token of every turn is trained"
    assert [turn.reward for turn in conversation.turns] == [4.0, 4.0, 4.0]
    assert [message["content"] for message in conversation.messages[1::2]] == list(TEXTS)
    assert conversation.completion_ids == [token for own in sampled for token in own]


async def test_sampled_history_stays_one_sequence(thinker: PromptTokenizer) -> None:
    conversation, script = await converse(thinker, environments.Echo(num_turns=3), *TEXTS)
    assert conversation.sequence_starts == []
    assert conversation.sequences == [conversation.token_ids]
    assert [ids for ids, _, _ in script.requests] == [conversation.token_ids[: t.start] for t in conversation.turns]


@pytest.mark.parametrize("num_turns", [1, 2, 3])
async def test_a_rendered_conversation_resumes_from_its_saved_turns(thinker: PromptTokenizer, num_turns: int) -> None:
    saved: list[PartialResponse] = []
    settings: dict[str, Any] = {"history": "as_rendered"}
    texts, environment = (*TEXTS, "gh!w"), environments.Echo(num_turns=4)
    saver = ProgressSaver(saved.append, every_tokens=1)
    whole, _ = await converse(thinker, environment, *texts, on_progress=saver.update, **settings)
    again, script = await converse(thinker, environment, *texts[num_turns:], begun=saved[num_turns - 1], **settings)
    assert again == whole
    assert len(script.requests) == 4 - num_turns


async def test_max_tokens_limits_each_rendered_sequence(thinker: PromptTokenizer) -> None:
    conversation, script = await converse(
        thinker, environments.Echo(num_turns=9), *("abc!x",) * 9, max_tokens=24, max_turns=9, history="as_rendered"
    )
    assert conversation.finish_reason == "length"
    assert 1 < len(conversation.turns) < 9
    assert max(map(len, conversation.sequences)) <= 24 < len(conversation.token_ids)
    assert len(conversation.sequence_starts) == len(conversation.turns) - 1
    assert all(len(ids) + room <= 24 for ids, room, _ in script.requests)
    trajectory_of(conversation)


async def test_texts_without_a_template_stay_as_sampled(thinker: PromptTokenizer) -> None:
    texts = environments.Echo(num_turns=2, in_messages=False)
    rendered, _ = await converse(thinker, texts, "ab", "cd", history="as_rendered")
    sampled, _ = await converse(thinker, environments.Echo(num_turns=2, in_messages=False), "ab", "cd")
    assert rendered == sampled


@pytest.mark.parametrize("history", ["as_sampled", "as_rendered"])
async def test_a_kept_conversation_goes_on_from_its_tokens_on_another_day(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, history: str
) -> None:
    saved: list[PartialResponse] = []
    saver = ProgressSaver(saved.append, every_tokens=1)
    settings: dict[str, Any] = {"history": history, "max_tokens": 200}
    tokenizer = saved_tokenizer(tmp_path / "old", DATED.replace("strftime_now('%d %b %Y')", "'01 Jan 2020'"))
    await converse(tokenizer, environments.Echo(num_turns=2), "ab", "c", on_progress=saver.update, **settings)
    today = saved_tokenizer(tmp_path / "new", DATED)
    conversation, script = await converse(today, environments.Echo(num_turns=2), "c", begun=saved[0], **settings)
    assert conversation.token_ids[: len(saved[0].given[0])] == saved[0].given[0]
    ((ids, _, _),) = script.requests
    date = datetime.now().strftime("%d %b %Y") if history == "as_rendered" else "01 Jan 2020"
    assert tokenizer.tokenizer.decode(ids).startswith(f"{date}<bos>")
    with pytest.raises(EnvironmentFault, match="gave another answer than before"):
        await converse(today, environments.Echo(num_turns=2), "c", begun=saved[0], columns={"word": "h"}, **settings)


def test_only_dates_of_the_templates_format_may_differ(tmp_path: Path) -> None:
    tokenizer = saved_tokenizer(tmp_path, DATED)
    today = datetime.now().strftime("%d %b %Y")
    own = tokenizer.encode_part(f"{today}, ab{today}")

    def differ(text: str) -> bool:
        return differ_by_date(tokenizer.tokenizer, own, tokenizer.encode_part(text))

    assert differ(f"{REDATED[0]}, ab{REDATED[1]}")
    assert not differ(f"{REDATED[0]}, ac{REDATED[1]}")
    assert not differ(f"never, ab{REDATED[1]}")
    tokenizer.tokenizer.chat_template = TEMPLATE
    assert not differ(f"{REDATED[0]}, ab{REDATED[1]}")


def test_a_response_is_history_as_text_or_as_what_it_consists_of() -> None:
    call, unreadable = ToolCall("add", {"first": 1}), ToolCall("", {}, "the call is not JSON")
    assert assistant_message("a", None) == {"role": "assistant", "content": "a"}
    assert assistant_message("a", ParsedResponse("", "", [unreadable])) == {"role": "assistant", "content": "a"}
    called = assistant_message("so <tool_call>", ParsedResponse("so", "", [call]))
    assert called["content"] == "so"
    (found,) = called["tool_calls"]
    assert found["function"] == {"name": "add", "arguments": {"first": 1}}
    assert len(found["id"]) == 9, "as the templates of Mistral require"
    in_channels = assistant_message("raw", ParsedResponse("b", "why", [], has_channels=True))
    assert (in_channels["content"], in_channels["thinking"]) == ("b", "why")
