"""Tests of reading responses with vLLM's parsers. Formats of real models are in `tests/conformance`."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.errors import InputError
from rollout_actors.config import EnvironmentConfig
from rollout_actors.conversations.runner import Conversations
from rollout_actors.engine.vllm_parsers import VllmResponseParser
from rollout_actors.environments.tools import Tools
from rollout_actors.parser_choice import Parsers
from rollout_actors.prompts import PromptTokenizer
from rollout_actors.tool_calls import ToolCall
from tests.support.chat import make_tokenizer
from tests.support.environments import add

pytestmark = pytest.mark.process
SCHEMAS = Tools([add]).schemas
CALL = '<tool_call>{"name": "add", "arguments": {"first": 1, "second": 2}}</tool_call>'


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> PromptTokenizer:
    tokenizer, folder = make_tokenizer(), tmp_path_factory.mktemp("model")
    tokenizer.add_tokens(list('<>_/{}"()'))
    tokenizer.save_pretrained(folder)
    return PromptTokenizer(str(folder), max_prompt_tokens=32)


def parser(prompts: PromptTokenizer, tool: str, reasoning: str = "none", **changes: Any) -> VllmResponseParser:
    settings: dict[str, Any] = {"schemas": SCHEMAS, "end_ids": prompts.end_ids} | changes
    return VllmResponseParser(prompts.tokenizer, tool, reasoning, **settings)


def read(made: VllmResponseParser, prompts: PromptTokenizer, text: str) -> Any:
    return made.read([], [*prompts.encode_part(text), prompts.tokenizer.eos_token_id])


def test_a_response_is_read_without_its_end_token(prompts: PromptTokenizer) -> None:
    parsed = read(parser(prompts, "hermes"), prompts, f"so {CALL}")
    assert parsed.calls == [ToolCall("add", {"first": 1, "second": 2})]
    assert (parsed.text, parsed.thoughts) == ("so", "")
    assert read(parser(prompts, "hermes"), prompts, "plain").text == "plain"


def test_no_call_is_read_without_a_parser_or_functions(prompts: PromptTokenizer) -> None:
    assert list(read(parser(prompts, "none"), prompts, CALL).calls) == []
    assert list(read(parser(prompts, "hermes", schemas=[]), prompts, CALL).calls) == []


def test_one_wrong_call_of_several_is_named(prompts: PromptTokenizer) -> None:
    first, second = read(parser(prompts, "hermes"), prompts, f"<tool_call>add(1)</tool_call>{CALL}").calls
    assert first.error.startswith("the call is not JSON")
    assert second.arguments == {"first": 1, "second": 2}


def test_an_error_of_a_parser_is_the_result_of_a_call(
    prompts: PromptTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = parser(prompts, "hermes")

    def broken(content: str, request: object) -> None:
        raise IndexError("list index out of range")

    monkeypatch.setattr(made._tool_parser, "extract_tool_calls", broken)
    (call,) = read(made, prompts, CALL).calls
    assert call.error == "the call cannot be read (list index out of range)"


@pytest.mark.parametrize(
    ("tool", "reasoning", "message"),
    [
        ("hermse", "none", r"environment\.tool_parser: vLLM has no tool parser 'hermse', only .*hermes"),
        ("llama3_json", "none", r"environment\.tool_parser: llama3_json does not work with the model's tokenizer"),
        ("openai", "none", r"environment\.tool_parser: openai reads the tokens of gpt-oss"),
        ("hermes", "qwen", r"environment\.reasoning_parser: vLLM has no reasoning parser 'qwen', only .*qwen3"),
        (
            "hermes",
            "deepseek_r1",
            r"environment\.reasoning_parser: deepseek_r1 does not work with the model",
        ),
        ("hermes", "openai_gptoss", r"environment\.reasoning_parser: openai_gptoss has no marks around thoughts"),
    ],
)
def test_parsers_that_do_not_fit_are_named(prompts: PromptTokenizer, tool: str, reasoning: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parser(prompts, tool, reasoning)


async def test_conversations_make_a_parser_if_functions_are_offered(prompts: PromptTokenizer) -> None:
    config = EnvironmentConfig(path="tests.support.environments:Adder")
    engine: Any = None
    conversations = Conversations(config, prompts, engine, Parsers("hermes", "none"), max_response_tokens=8)
    assert await conversations._parser_for([]) is None
    made = await conversations._parser_for(SCHEMAS)
    assert made is not None
    assert made is await conversations._parser_for(SCHEMAS)
    assert [call.name for call in made.read([], prompts.encode_part(CALL)).calls] == ["add"]
    await conversations.close()
