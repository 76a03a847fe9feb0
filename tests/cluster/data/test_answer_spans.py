"""Test that the model's answers are found exactly in what a chat template wrote for a prompt."""

from __future__ import annotations

import json
from typing import Any

import pytest

from cluster.data.answer_spans import answer_spans, answer_token_spans
from cluster.data.chat_template import render
from cluster.data.text_tokens import token_ids
from cluster.data.tool_calls import require_tools_written, with_objects
from cluster.errors import InputError
from tests.support.chat import TEMPLATE, assistant, make_tokenizer, user

CHATML = """{%- if tools %}
    {{- '[system]' }}{%- for tool in tools %}{{ tool | tojson }}{% endfor %}{{- eos_token + '\\n' }}
{%- endif %}
{%- set ns = namespace(last=0) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '[assistant]\\n' }}
        {%- if loop.index0 > ns.last and message.reasoning %}
            {{- 'think:' + message.reasoning + '\\n' }}
        {%- endif %}
        {{- message.content or '' }}
        {%- for call in message.tool_calls or [] %}
            {{- '\\ncall:' }}{{ call.function.arguments | tojson }}
        {%- endfor %}
        {{- eos_token + '\\n' }}
    {%- else %}
        {{- '[user]\\n' + message.content + eos_token + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '[assistant]\\n' }}
{%- endif %}
"""
"""Lists tools, writes calls, and leaves earlier thoughts out of history, as many templates do."""
OPENS_THOUGHTS = CHATML.replace(
    "    {{- '[assistant]\\n' }}\n{%- endif %}", "    {{- '[assistant]\\nthink:' }}\n{%- endif %}"
)
OTHER_END = """{% for m in messages %}[{{ m.role }}]{{ m.content }}
{%- if m.role == 'user' or loop.last %}{{ eos_token }}{% else %}<unk>{% endif %}
{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"""
"""Ends an answer in history with another token than the last answer."""
NO_LOOP = "{{ messages[0].content }}{{ messages[1].content }}{{ messages[2].content }}"


def call(arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", "arguments": arguments}}


CALL = {"role": "assistant", "content": None, "tool_calls": [call({"x": 1}), call({"y": "z"})]}
THOUGHT = {**assistant("b"), "reasoning": "hm"}


def answers(template: str, messages: list[dict[str, Any]]) -> list[str]:
    """Return the texts of a prompt's answers, whose tokens must be the same."""
    tokenizer = make_tokenizer(template)
    prompt = render(tokenizer, messages, "row", is_prompt=True)
    texts = [prompt[start:end] for start, end in answer_spans(tokenizer, messages, prompt, "row")]
    (ids,) = token_ids(tokenizer, [prompt])
    spans = answer_token_spans(tokenizer, messages, prompt, ids, "row")
    literals = [
        token_ids(tokenizer, [prompt.part(*span)])[0] for span in answer_spans(tokenizer, messages, prompt, "row")
    ]
    assert [ids[start:end] for start, end in spans] == literals
    return texts


@pytest.mark.parametrize(
    ("template", "messages", "expected"),
    [
        (TEMPLATE, [user("a"), assistant("b"), user("c"), assistant(" d "), user("e")], ["b<eos>", "d<eos>"]),
        (TEMPLATE, [user("a"), assistant("b <eos> c"), user("c")], ["b <eos> c<eos>"]),
        (CHATML, [user("a"), assistant("b"), user("c")], ["b<eos>"]),
        (CHATML, [user("a"), THOUGHT, user("c")], ["b<eos>"]),
        (CHATML, [user("a"), THOUGHT, {"role": "tool", "content": "r"}], ["think:hm\nb<eos>"]),
        (
            CHATML,
            [user("a"), CALL, {"role": "tool", "content": "r"}, assistant("b"), user("c")],
            ['\ncall:{"x": 1}\ncall:{"y": "z"}<eos>', "b<eos>"],
        ),
        (OPENS_THOUGHTS, [user("a"), assistant("the b"), user("c")], ["the b<eos>"]),
        (OTHER_END, [user("a"), assistant("b"), user("c")], ["b"]),
    ],
)
def test_each_answer_is_what_the_model_would_write(
    template: str, messages: list[dict[str, Any]], expected: list[str]
) -> None:
    assert answers(template, messages) == expected


def test_a_template_that_does_not_loop_over_messages_is_refused() -> None:
    with pytest.raises(InputError, match="does not write the messages one by one") as error:
        answers(NO_LOOP, [user("a"), assistant("b"), user("c")])
    assert error.value.where == "row"
    assert 'sft.train_on = "last"' in error.value.what


def test_tools_and_calls_that_a_template_leaves_out_are_refused() -> None:
    tools: list[dict[str, Any]] = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    plain, listing = make_tokenizer(TEMPLATE), make_tokenizer(CHATML)
    require_tools_written(listing, [user("a"), CALL], tools, "row")
    require_tools_written(plain, [user("a")], [], "row")
    with pytest.raises(InputError, match="row: the chat template does not write the row's tools"):
        require_tools_written(plain, [user("a")], tools, "row")
    with pytest.raises(InputError, match="row: the chat template does not write the row's tool calls"):
        require_tools_written(plain, [user("a"), {**CALL, "content": "b"}], [], "row")


def test_arguments_as_text_become_objects_if_the_template_quotes_them() -> None:
    talk: list[dict[str, Any]] = [
        user("a"),
        {**CALL, "tool_calls": [call(json.dumps({"x": 1})), call("no json"), call({"y": 2})]},
    ]
    parsed = with_objects(make_tokenizer(CHATML), talk)
    assert parsed == [user("a"), {**CALL, "tool_calls": [call({"x": 1}), call("no json"), call({"y": 2})]}]
    as_is = CHATML.replace("{{ call.function.arguments | tojson }}", "{{ call.function.arguments }}")
    assert with_objects(make_tokenizer(as_is), talk) == talk
