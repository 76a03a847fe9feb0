"""Whole conversations as tokens: what is masked in and out, what a template writes between, where they end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import EnvironmentFault, InputError
from cluster.trajectory import PartialResponse, Segment, Turn
from rollout_actors.config import EnvironmentConfig
from rollout_actors.conversations.conversation import Conversation, environment_seed, score_request
from rollout_actors.conversations.dialogue import Keeping, Table
from rollout_actors.engine.response import SampledResponse
from rollout_actors.environments.host import HostedHere, Threads
from rollout_actors.prompts import PromptTokenizer
from tests.support import environments
from tests.support.chat import TEMPLATE, assistant, make_tokenizer, user

EOS = 1


@pytest.fixture(scope="module")
def tokenizer(chat_folder: Path) -> PromptTokenizer:
    return PromptTokenizer(str(chat_folder), max_prompt_tokens=32)


class Script:
    """Answers with these texts; ends each with the end-of-sequence token unless it is cut at `max_tokens`."""

    def __init__(self, tokenizer: PromptTokenizer, *texts: str) -> None:
        self._tokenizer = tokenizer
        self._texts = list(texts)
        self.asked: list[tuple[list[int], int, int]] = []

    async def __call__(self, token_ids: Sequence[int], *, max_tokens: int, first_segment: int) -> SampledResponse:
        self.asked.append((list(token_ids), max_tokens, first_segment))
        ids = [*self._tokenizer.encode_part(self._texts.pop(0)), EOS][:max_tokens]
        segments = [Segment(3, 0, 1, 7, "a"), Segment(4, 1, len(ids) - 1, 8, "a")][: len(ids)]
        return SampledResponse("u", ids, [-1.0] * len(ids), segments, "stop" if ids[-1] == EOS else "length")


async def held(
    tokenizer: PromptTokenizer, environment: Any, *texts: str, columns: Any = (), seed: int = 1, **settings: Any
) -> tuple[Conversation, Script]:
    script = Script(tokenizer, *texts)
    host = HostedHere(environment, Threads(1), timeout_s=10)
    limit = settings.pop("max_response_tokens", 16)
    begun, keep = settings.pop("begun", None), settings.pop("keep", None)
    table = Table(host, tokenizer, EnvironmentConfig(**settings), max_response_tokens=limit)
    columns = dict(columns)
    return await table.hold("u", seed=seed, columns=columns, sample=script, begun=begun, keep=keep), script


async def test_the_tokens_are_those_of_the_whole_conversation_as_the_template_writes_it(
    tokenizer: PromptTokenizer,
) -> None:
    conversation, script = await held(tokenizer, environments.Echo(num_turns=3), "xy", "z", "abc")
    messages = conversation.messages
    assert [message["role"] for message in messages] == ["user", "assistant", "user", "assistant", "user", "assistant"]
    text = tokenizer.tokenizer.apply_chat_template(messages, tokenize=False)
    whole = tokenizer.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert conversation.token_ids == whole[:-1], "all but the line break behind the last answer"
    sampled = [token for token, mask in zip(conversation.token_ids, conversation.mask, strict=True) if mask]
    assert tokenizer.decode([sampled]) == ["xyzabc"]
    assert [ids for ids, _, _ in script.asked] == [whole[: turn.start] for turn in conversation.turns], (
        "each turn is asked for with all that stands before it"
    )


async def test_every_turn_has_its_reward_its_segments_and_its_log_probabilities(tokenizer: PromptTokenizer) -> None:
    conversation, script = await held(tokenizer, environments.Echo(num_turns=2), "xy", "zzz")
    first, second = conversation.turns
    assert (first.length, first.reward, second.length, second.reward) == (3, 2.0, 4, 3.0)
    assert [(s.start, s.length) for s in conversation.segments] == [
        (first.start, 1),
        (first.start + 1, 2),
        (second.start, 1),
        (second.start + 1, 3),
    ]
    assert [first_segment for _, _, first_segment in script.asked] == [0, 2]
    assert [value == -1.0 for value in conversation.logprobs] == conversation.mask
    assert (conversation.finish_reason, conversation.turn_rewards, conversation.response) == ("stop", 5.0, "zzz")
    assert conversation.parts == {"answers": 2.0}
    assert conversation.last_response == [*tokenizer.encode_part("zzz"), EOS]


async def test_a_response_that_was_cut_is_closed_by_the_template_and_not_by_the_policy(
    tokenizer: PromptTokenizer,
) -> None:
    conversation, _ = await held(tokenizer, environments.Echo(num_turns=2), "xyz", "a", max_response_tokens=3)
    first = conversation.turns[0]
    behind = conversation.token_ids[first.start + first.length :]
    assert behind[0] == EOS
    assert not conversation.mask[first.start + first.length]
    uncut, _ = await held(tokenizer, environments.Echo(num_turns=2), "xyz", "a")
    assert uncut.token_ids == conversation.token_ids


async def test_in_plain_text_everything_stands_as_it_is_said(tokenizer: PromptTokenizer) -> None:
    conversation, _ = await held(tokenizer, environments.Echo(num_turns=2, in_messages=False), "xy", "z")
    start = conversation.messages[0]["content"]
    ids = [*tokenizer.encode([start])[0], *tokenizer.encode_part("xy"), EOS, *tokenizer.encode_part("1ok")]
    assert conversation.token_ids == [*ids, *tokenizer.encode_part("z"), EOS]
    assert conversation.prompt == start


async def test_it_ends_after_the_turns_or_where_no_token_fits_and_is_cut_then(tokenizer: PromptTokenizer) -> None:
    by_turns, _ = await held(tokenizer, environments.Echo(num_turns=9), *("ab",) * 9, max_turns=3)
    assert (len(by_turns.turns), by_turns.finish_reason) == (3, "length")
    by_tokens, script = await held(
        tokenizer, environments.Echo(num_turns=9), *("abcdef",) * 9, max_tokens=30, max_turns=9
    )
    assert by_tokens.finish_reason == "length"
    assert all(len(ids) + room <= 30 for ids, room, _ in script.asked)
    assert 1 < len(by_tokens.turns) < 9
    assert len(by_tokens.token_ids) <= 30, "an observation that leaves no room for an answer is no part of it"
    assert by_tokens.mask[-1]


async def test_the_same_seed_begins_alike_and_columns_reach_the_environment(tokenizer: PromptTokenizer) -> None:
    starts = [
        (await held(tokenizer, environments.Echo(), "a", "b", seed=seed, columns={"word": "q"}))[0].messages[0][
            "content"
        ]
        for seed in (1, 1, *range(20))
    ]
    assert starts[0] == starts[1]
    assert len(set(starts)) == 4
    assert all(start.endswith("q") for start in starts)


async def test_what_the_environment_breaks_is_raised(tokenizer: PromptTokenizer) -> None:
    with pytest.raises(EnvironmentFault, match="no luck"):
        await held(tokenizer, environments.Odd("raises"), "a")


async def test_a_call_is_a_turn_and_its_result_an_observation(tmp_path: Path) -> None:
    letters = make_tokenizer(TEMPLATE)
    letters.add_tokens(list('<>_/{}"()'))
    letters.save_pretrained(tmp_path)
    tokenizer = PromptTokenizer(str(tmp_path), max_prompt_tokens=32)
    response = '<tool_call>{"name": "add", "arguments": {"first": 2, "second": 3}}</tool_call>'
    conversation, _ = await held(tokenizer, environments.Adder(num_turns=1), response, "5", max_response_tokens=100)
    assert [message["role"] for message in conversation.messages] == ["user", "assistant", "tool", "assistant"]
    assert conversation.messages[2]["content"] == "5"
    assert [turn.reward for turn in conversation.turns] == [0.0, 1.0]


async def test_a_template_that_drops_the_answer_is_refused(chat_folder: Path, tokenizer: PromptTokenizer) -> None:
    forgetful = PromptTokenizer(str(chat_folder), max_prompt_tokens=32)
    forgetful.tokenizer.chat_template = TEMPLATE.replace("{{ m['content'] | trim }}", "")
    with pytest.raises(InputError, match="leaves out what the policy answered"):
        await held(forgetful, environments.Echo(), "a", "b")
    forgetful.tokenizer.chat_template = None
    with pytest.raises(InputError, match="has no chat template"):
        await held(forgetful, environments.Echo(), "a", "b")


def test_all_responses_of_a_group_meet_the_same_beginning_and_other_groups_another() -> None:
    seeds = [environment_seed(f"0-{group}") for group in range(100)]
    assert len(set(seeds)) == 100
    assert environment_seed("0-7") == seeds[7]
    assert all(0 <= seed < 2**31 for seed in seeds)


def test_the_scorer_gets_the_last_response_with_the_conversation_and_the_rows_columns() -> None:
    conversation = Conversation("u", "ask", [5, 6], [0.0, -1.0], [], [Turn(1, 1, 2.0)], "stop")
    plain = score_request(conversation, "said", {"prompt": "ask", "answer": "yes"})
    assert (plain.id, plain.prompt, plain.response, dict(plain.columns)) == ("u", "ask", "said", {"answer": "yes"})
    messages = [user("ask"), assistant("said")]
    whole = score_request(replace(conversation, messages=messages), "said", {"prompt": ""})
    assert dict(whole.columns) == {"conversation": messages}


async def kept(
    tokenizer: PromptTokenizer, environment: Any, *texts: str, every_tokens: int = 1
) -> tuple[Conversation, list[PartialResponse]]:
    """A whole conversation, and what was kept of it on the way."""
    heard: list[PartialResponse] = []
    keep = Keeping(heard.append, every_tokens=every_tokens)
    conversation, _ = await held(tokenizer, environment, *texts, keep=keep)
    return conversation, heard


@pytest.mark.parametrize("num_turns", [1, 2, 3])
@pytest.mark.parametrize("in_messages", [True, False])
async def test_a_conversation_goes_on_from_the_turns_that_were_kept_as_if_it_had_never_stopped(
    tokenizer: PromptTokenizer, num_turns: int, in_messages: bool
) -> None:
    texts, world = ("xy", "z", "abc", "de"), environments.Echo(num_turns=4, in_messages=in_messages)
    whole, partials = await kept(tokenizer, world, *texts)
    begun = partials[num_turns - 1]
    again, script = await held(tokenizer, world, *texts[num_turns:], begun=begun)
    assert again == whole
    assert world.heard == list(texts), "the environment hears what was said before too"
    assert [first_segment for _, _, first_segment in script.asked] == [2 * n for n in range(num_turns, 4)]


async def test_turns_are_kept_whenever_so_many_tokens_more_have_been_sampled(tokenizer: PromptTokenizer) -> None:
    _, partials = await kept(tokenizer, environments.Echo(num_turns=4), "xy", "z", "abc", "de", every_tokens=5)
    assert [len(partial.token_ids) for partial in partials] == [5, 12]
    assert [sum(map(bool, partial.given)) for partial in partials] == [2, 4]


async def test_a_conversation_in_which_what_was_said_has_no_token_is_not_kept(
    tokenizer: PromptTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded = tokenizer.encode_part
    monkeypatch.setattr(tokenizer, "encode_part", lambda text: [] if text == "~" else encoded(text))
    _, partials = await kept(tokenizer, environments.Silent(num_turns=3, in_messages=False), "xy", "z", "abc")
    assert [len(partial.token_ids) for partial in partials] == [3], "the first turn is told from the prompt before it"


async def test_an_environment_that_answers_otherwise_the_second_time_is_at_fault(tokenizer: PromptTokenizer) -> None:
    _, partials = await kept(tokenizer, environments.Echo(num_turns=3), "xy", "z", "abc")
    with pytest.raises(EnvironmentFault, match="answers otherwise than it did before"):
        await held(tokenizer, environments.Echo(num_turns=3), "abc", begun=partials[1], columns={"word": "h"})
