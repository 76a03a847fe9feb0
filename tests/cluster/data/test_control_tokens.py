"""Control tokens are found by flag and spelling, and messages cannot make them, alone or together."""

from __future__ import annotations

import re
from typing import Any

import pytest
from tokenizers import AddedToken

from cluster.data.chat_template import render
from cluster.data.control_tokens import Spellings, answer_spellings, control_spellings, is_control
from cluster.data.text_tokens import token_ids
from tests.support.chat import assistant, make_tokenizer, user

THINK, CALL, TURN = "<think>", "<tool_response>", "<|user|>"


def thinking_tokenizer(template: str | None = None) -> Any:
    """Return a tokenizer with added tokens that are not flagged as special."""
    tokenizer = make_tokenizer(*([] if template is None else [template]))
    unflagged = (THINK, CALL, TURN, "<b>", "  ")
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in unflagged])
    return tokenizer


@pytest.mark.parametrize("text", [THINK, "</tool_call>", TURN, "[INST]", "<｜User｜>", "<unused7>", "[/TOOLS]"])
def test_added_tokens_in_brackets_are_control_tokens(text: str) -> None:
    assert is_control(text)


@pytest.mark.parametrize("text", ["<b>", "</table>", "<br/>", "\n\n", "    ", "word", "<", "a<b>", "<a b>"])
def test_html_spaces_and_words_are_ordinary_text(text: str) -> None:
    assert not is_control(text)


def ids_of(tokenizer: Any, text: str) -> int:
    return int(tokenizer.convert_tokens_to_ids(text))


def test_only_the_assistant_writes_its_own_words() -> None:
    tokenizer = thinking_tokenizer()
    assert control_spellings(tokenizer).spans(THINK + CALL + "<b>") == [(0, 7), (7, 22)]
    assert answer_spellings(tokenizer).spans(THINK + CALL) == [(7, 22)]
    said = THINK + CALL + TURN + "<b>  "
    (ids,) = token_ids(tokenizer, [render(tokenizer, [user(said), assistant(said)], "row", is_prompt=False)])
    counts = {text: ids.count(ids_of(tokenizer, text)) for text in (THINK, CALL, TURN, "<b>")}
    assert counts == {THINK: 1, CALL: 0, TURN: 0, "<b>": 2}


def test_unflagged_tokens_of_the_template_stay_control_tokens() -> None:
    template = "{% for m in messages %}<|user|>{{ m.content }}<eos>{% endfor %}<think>"
    tokenizer = thinking_tokenizer(template)
    (ids,) = token_ids(tokenizer, [render(tokenizer, [user("a<think><eos>")], "row", is_prompt=True)])
    assert [ids.count(ids_of(tokenizer, text)) for text in (TURN, THINK, "<eos>")] == [1, 1, 1]
    assert ids[-1] == ids_of(tokenizer, THINK)


@pytest.mark.parametrize(("first", "second"), [("<|us", "er|>"), ("a <|user|", ">b"), ("<", "eos> "), ("[use ", "r]")])
def test_two_texts_do_not_make_a_control_token_together(first: str, second: str) -> None:
    template = "{% for m in messages %}{{ m.content | trim }}{% endfor %}"
    tokenizer = thinking_tokenizer(template)
    rendered = render(tokenizer, [user(first), user(second)], "row", is_prompt=True)
    assert rendered == first.strip() + second.strip()
    (ids,) = token_ids(tokenizer, [rendered])
    assert not {ids_of(tokenizer, text) for text in (TURN, "<eos>", "[user]")} & set(ids)


def test_keys_and_roles_do_not_make_control_tokens() -> None:
    template = "{% for m in messages %}{{ m.role }}{{ m.arguments | tojson }}{% endfor %}"
    tokenizer = thinking_tokenizer(template)
    message = {"role": "x<eos>", "content": "", "arguments": {"<eos>": {"[user]": ["<|user|>"]}}}
    rendered = render(tokenizer, [message], "row", is_prompt=True)
    assert rendered == 'x<eos>{"<eos>": {"[user]": ["<|user|>"]}}'
    (ids,) = token_ids(tokenizer, [rendered])
    assert not {ids_of(tokenizer, text) for text in (TURN, "<eos>", "[user]")} & set(ids)


def test_the_longest_token_is_found_at_each_place() -> None:
    texts = ["<a>", "<a>b", "<a", "[x]", "<", "[x]y"]
    spellings = Spellings.of(texts)
    for text in ("<a>b<a><a<[x]y[x[x]", "", "a>", "[x", "<<a>>"):
        longest = re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))))
        assert spellings.spans(text) == [found.span() for found in longest.finditer(text)]


def test_text_without_control_tokens_has_no_literals() -> None:
    assert render(make_tokenizer(), [user("> a < b ]"), assistant("[")], "row", is_prompt=False).literals == ()
