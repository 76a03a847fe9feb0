"""Tests of reading thoughts and calls of functions in a response's text."""

from __future__ import annotations

import pytest

from rollout_actors.tool_calls import ToolCall, read_calls, without_thoughts

NAMES = ("add", "now")
ADD = ToolCall("add", {"first": 2})


@pytest.mark.parametrize(
    ("content", "calls"),
    [
        ('so <tool_call>{"name": "add", "arguments": {"first": 2}}</tool_call>', [ADD]),
        ('<tool_call>{"name": "add", "arguments": "{\\"first\\": 2}"}</tool_call>', [ADD]),
        ('<tool_call>[{"name": "add", "arguments": {"first": 2}}, {"name": "now"}]', [ADD, ToolCall("now", {})]),
        ('<tool_call>{"type": "function", "function": {"name": "add", "arguments": {"first": 2}}}</tool_call>', [ADD]),
        ('{"name": "add", "parameters": {"first": 2}}', [ADD]),
        ('[{"name": "add", "arguments": {"first": 2}}, {"name": "now"}]', [ADD, ToolCall("now", {})]),
        ('<tool_call>{"name": "sub", "arguments": {}}</tool_call>', [ToolCall("sub", {})]),
        ('{"name": "Paris", "arguments": "of Troy"}', []),
        ('{"name": "add", "population": 2}', []),
        ('{"name": "add"} is a call', []),
        ('[1, {"name": "add"}]', []),
        ("[]", []),
        ("[" * 100_000, []),
        ("no call", []),
    ],
)
def test_calls_are_read_and_ordinary_json_answers_are_not(content: str, calls: list[ToolCall]) -> None:
    assert read_calls(content, NAMES) == calls


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ("<tool_call>add(1)</tool_call>", "the call is not JSON"),
        ('<tool_call>{"name": 1}</tool_call>', 'a call must be {"name": ..., "arguments": {...}}'),
        ('<tool_call>{"name": "add", "arguments": 3}</tool_call>', "arguments must be an object"),
        ('<tool_call>{"name": "add", "arguments": "first"}</tool_call>', "the arguments are not JSON"),
    ],
)
def test_a_call_that_cannot_be_read_says_why(content: str, error: str) -> None:
    (call,) = read_calls(content, NAMES)
    assert call.error.startswith(error)


def test_lone_surrogates_in_arguments_are_replaced() -> None:
    (call,) = read_calls('{"name": "add", "arguments": {"first": "\\ud800"}}', NAMES)
    assert call.arguments == {"first": "\ufffd"}


def test_a_wrong_call_does_not_hide_the_others() -> None:
    first, second = read_calls('<tool_call>{"name": </tool_call><tool_call>{"name": "now"}</tool_call>', NAMES)
    assert first.error
    assert second == ToolCall("now", {})


@pytest.mark.parametrize(
    ("text", "is_open", "thoughts", "content"),
    [
        ("<think>a</think>b", False, "a", "b"),
        ("a</think>b", False, "a", "b"),
        ("a</think>b", True, "a", "b"),
        ("<think>a</think>b", True, "a", "b"),
        ("<think>a", False, "a", ""),
        ("a", True, "a", ""),
        ("a", False, "", "a"),
        ("a<think>b</think>c<think>d</think>e", False, "bd", "ace"),
        ("", False, "", ""),
    ],
)
def test_thoughts_are_separated(text: str, is_open: bool, thoughts: str, content: str) -> None:
    assert without_thoughts(text, is_open=is_open) == (thoughts, content)
