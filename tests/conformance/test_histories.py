"""Histories, calls and ends of turns in the formats of real models: ids are those of `apply_chat_template`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from cluster.trajectory import Segment
from rollout_actors.config import EnvironmentConfig
from rollout_actors.conversations.conversation import Conversation
from rollout_actors.conversations.dialogue import Dialogue
from rollout_actors.engine.response import SampledResponse
from rollout_actors.engine.vllm_parsers import VllmResponseParser
from rollout_actors.environments.host import InProcessHost, Threads
from rollout_actors.parser_choice import Parsers, choose_parsers
from rollout_actors.prompts import PromptTokenizer
from rollout_actors.tool_calls import ResponseParser, ToolCall
from tests.conformance.conversations import WEATHER
from tests.conformance.tokenizers import SOURCES, VERSION, NotAvailable, model_folder

pytestmark = pytest.mark.slow
CITY = "Zürich"
SUN = "12 °C, naïve ☀"
CALL = ToolCall("weather", {"city": CITY})
ARGUMENTS = json.dumps(CALL.arguments, ensure_ascii=False)
CALLS = {
    "qwen3": f'<tool_call>\n{{"name": "weather", "arguments": {ARGUMENTS}}}\n</tool_call><|im_end|>',
    "llama3_2": f'{{"name": "weather", "parameters": {ARGUMENTS}}}<|eot_id|>',
    "mistral_nemo": f'[TOOL_CALLS][{{"name": "weather", "arguments": {ARGUMENTS}, "id": "call00000"}}]</s>',
    "gptoss": f" to=functions.weather<|channel|>commentary json<|message|>{ARGUMENTS}<|call|>",
}
"""A call as the template writes it behind its header, up to the end of the turn."""
PARSERS = {
    "qwen3": Parsers("hermes", "deepseek_r1"),
    "llama3_2": Parsers("llama3_json", "none"),
    "mistral_nemo": Parsers("mistral", "none"),
    "gptoss": Parsers("openai", "openai_gptoss"),
}
THOUGHTS = {
    "qwen3": [f"<think>\nI could {CALLS['qwen3'].removesuffix('<|im_end|>')}\n</think>\n\nSunny.<|im_end|>"],
    "gptoss": [
        f"<|channel|>analysis<|message|>I could {ARGUMENTS}<|end|>"
        "<|start|>assistant<|channel|>final<|message|>Sunny.<|return|>"
    ],
}
THINKING = {"qwen3": "<think>\nHm.\n</think>\n\n"}
ANSWERS = {
    "qwen3": ("<think>\nHm.\n</think>\n\nSunny.<|im_end|>", "Rainy.<|im_end|>"),
    "llama3_2": ("Sunny.<|eot_id|>", "Rainy.<|eom_id|>"),
    "mistral_nemo": (" Sunny.</s>", " Rainy.</s>"),
    "gptoss": (
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Sunny.<|return|>",
        "<|channel|>final<|message|>Rainy.<|return|>",
    ),
}


@pytest.fixture(params=CALLS, scope="module")
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with the stop tokens of its generation_config.json."""
    try:
        source = model_folder(request.param)
    except NotAvailable as error:
        pytest.skip(str(error))
    folder: Path = tmp_path_factory.mktemp("models") / str(request.param)
    shutil.copytree(source, folder)
    tokenizer = PromptTokenizer(str(folder), max_prompt_tokens=4096).tokenizer
    stops = [tokenizer.convert_tokens_to_ids(token) for token in SOURCES[request.param].stops]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
    return folder


class Weather:
    """Asks twice, and offers a function."""

    def __init__(self, *, offers: bool) -> None:
        self.responses: list[str] = []
        if offers:
            self.tools = lambda: [weather]

    def reset(self, *, seed: int) -> Any:
        return [{"role": "user", "content": "The weather?"}]

    def step(self, response: str) -> Any:
        self.responses.append(response)
        return [{"role": "user", "content": "And today?"}], 1.0, len(self.responses) == 3, False, {}


def weather(city: str) -> str:
    """Return the weather of a city.

    Args:
        city: Name of the city
    """
    assert city == CITY
    return SUN


def parser_of(prompts: PromptTokenizer, parsers: Parsers) -> ResponseParser:
    return VllmResponseParser(prompts.tokenizer, *parsers, schemas=[WEATHER], end_ids=prompts.end_ids)


async def converse(
    folder: Path, environment: Weather, *responses: str, history: str = "as_sampled"
) -> tuple[Conversation, list[list[int]], Any]:
    """Return a conversation in which the policy samples these texts, the prompts of its turns, and the tokenizer."""
    prompts, asked, texts = PromptTokenizer(str(folder), max_prompt_tokens=4096), list[list[int]](), list(responses)

    async def sample(token_ids: Sequence[int], *, max_tokens: int, first_segment: int) -> SampledResponse:
        asked.append(list(token_ids))
        ids = prompts.tokenizer(texts.pop(0), add_special_tokens=False)["input_ids"]
        return SampledResponse("u", ids, [-1.0] * len(ids), [Segment(0, 0, len(ids), 1, "a")], "stop")

    async def parser_for(tools: Sequence[Any]) -> ResponseParser:
        return parser_of(prompts, PARSERS[name])

    config = EnvironmentConfig.model_validate({"history": history, "max_tokens": 4096, "max_turns": len(responses)})
    name = folder.name.removesuffix(f"-{VERSION}")
    host = InProcessHost(environment, Threads(1), timeout_s=10)
    dialogue = Dialogue(host, prompts, config, max_response_tokens=512, parser_for=parser_for)
    conversation = await dialogue.run("u", seed=0, columns={}, sample=sample)
    return conversation, asked, prompts.tokenizer


def expected(tokenizer: Any, messages: Sequence[Any], tools: Sequence[Any] = ()) -> list[int]:
    ids: list[int] = tokenizer.apply_chat_template(
        list(messages), tools=list(tools) or None, tokenize=True, add_generation_prompt=True, return_dict=False
    )
    return ids


def answered(name: str, text: str) -> dict[str, Any]:
    """Return an answer as a message, with the key of its thoughts that the template takes."""
    answer = text.rpartition("<|message|>")[2] if name == "gptoss" else text
    for end in SOURCES[name].stops or ("</s>",):
        answer = answer.removesuffix(end)
    has_thoughts = name == "gptoss" and "analysis" in text
    return {"role": "assistant", "content": answer} | ({"thinking": "Hm."} if has_thoughts else {})


def test_the_template_decides_on_the_parsers(folder: Path) -> None:
    assert choose_parsers(folder, EnvironmentConfig()) == PARSERS[folder.name]


async def test_a_call_gets_its_result_in_the_form_of_the_template(folder: Path) -> None:
    called = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "id": "call00000", "function": CALL._asdict()}],
    }
    del called["tool_calls"][0]["function"]["error"]  # type: ignore[index]
    result = {"role": "tool", "name": "weather", "tool_call_id": "call00000", "content": SUN}
    final = ANSWERS[folder.name][1]
    for history in ("as_sampled", "as_rendered"):
        environment = Weather(offers=True)
        conversation, asked, tokenizer = await converse(
            folder, environment, CALLS[folder.name], final, final, history=history
        )
        schemas = InProcessHost(Weather(offers=True), Threads(1), timeout_s=1)._tools.schemas
        first = [{"role": "user", "content": "The weather?"}]
        assert asked[1] == expected(tokenizer, [*first, called, result], schemas), history
        assert [message["content"] for message in conversation.messages if message["role"] == "tool"] == [SUN]
        assert len(environment.responses) == 2, "the call is no step of the environment"


@pytest.mark.parametrize("name", list(THINKING))
async def test_thoughts_before_a_call_stay_until_the_next_answer(name: str) -> None:
    try:
        folder = model_folder(name)
    except NotAvailable as error:
        pytest.skip(str(error))
    final, asked = ANSWERS[name][1], list[list[list[int]]]()
    for history in ("as_sampled", "as_rendered"):
        responses = (THINKING[name] + CALLS[name], final)
        _, prompts, tokenizer = await converse(folder, Weather(offers=True), *responses, history=history)
        asked.append(prompts)
    assert asked[0] == asked[1]
    assert "Hm." in tokenizer.decode(asked[0][1])


async def test_history_is_what_the_template_writes(folder: Path) -> None:
    name, (first, second) = folder.name, ANSWERS[folder.name]
    conversation, asked, tokenizer = await converse(
        folder, Weather(offers=False), first, second, second, history="as_rendered"
    )
    messages: list[Any] = [{"role": "user", "content": "The weather?"}]
    for number, text in enumerate((first, second)):
        assert asked[number] == expected(tokenizer, messages)
        messages += [answered(name, text), {"role": "user", "content": "And today?"}]
    assert asked[2] == expected(tokenizer, messages)
    sampled = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (first, second, second)]
    assert conversation.sequences == [[*prompt, *own] for prompt, own in zip(asked, sampled, strict=True)]


async def test_sampled_history_has_the_end_of_the_template_only(folder: Path) -> None:
    name, (_, second) = folder.name, ANSWERS[folder.name]
    conversation, asked, tokenizer = await converse(folder, Weather(offers=False), second, second, second)
    user = {"role": "user", "content": "And today?"}
    messages = [{"role": "user", "content": "The weather?"}, answered(name, second), user]
    assert asked[1] == expected(tokenizer, messages)
    assert asked[2] == expected(tokenizer, [*messages, answered(name, second), user])
    assert conversation.token_ids[: len(asked[2])] == asked[2]


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, texts in THOUGHTS.items() for text in texts])
def test_a_call_inside_thoughts_is_not_read(name: str, text: str) -> None:
    try:
        prompts = PromptTokenizer(str(model_folder(name)), max_prompt_tokens=4096)
    except NotAvailable as error:
        pytest.skip(str(error))
    parser = parser_of(prompts, PARSERS[name])
    parsed = parser.read([], prompts.tokenizer(text, add_special_tokens=False)["input_ids"])
    assert list(parsed.calls) == []
    assert "I could" in parsed.thoughts
    if name == "qwen3":
        opened = prompts.tokenizer("<think>", add_special_tokens=False)["input_ids"]
        inside = prompts.tokenizer(CALLS["qwen3"], add_special_tokens=False)["input_ids"]
        assert list(parser.read(opened, inside).calls) == []
        assert list(parser.read([], inside).calls) == [CALL]
        header = prompts.tokenizer("<|im_end|>\n<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]
        assert list(parser.read([*opened, *header], inside).calls) == [CALL], "thoughts of an earlier turn were cut off"


@pytest.mark.parametrize(
    ("name", "text", "calls"),
    [
        ("qwen3", '<tool_call>{"name": "weather", "arguments": "{\\"city\\": \\"Zürich\\"}"}</tool_call>', [CALL]),
        ("qwen3", f'<tool_call>[{{"name": "weather", "arguments": {ARGUMENTS}}}]</tool_call>', [CALL]),
        ("qwen3", f'{{"name": "weather", "arguments": {ARGUMENTS}}}', [CALL]),
        ("qwen3", '{"name": "Paris", "arguments": {}}', []),
        ("llama3_2", f'<|python_tag|>{{"name": "weather", "parameters": {ARGUMENTS}}}<|eom_id|>', [CALL]),
        ("llama3_2", 'It is {"name": "Paris", "parameters": {}}<|eot_id|>', []),
        ("llama3_2", '{"city": "Zürich"}<|eot_id|>', []),
        ("mistral_nemo", f'[TOOL_CALLS] [{{"name": "weather", "arguments": {ARGUMENTS}}}]</s>', [CALL]),
        ("mistral_nemo", '[{"city": "Zürich"}]</s>', []),
        (
            "gptoss",
            f"<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{ARGUMENTS}<|call|>",
            [CALL],
        ),
        ("gptoss", f"<|channel|>final<|message|>{ARGUMENTS}<|return|>", []),
    ],
)
def test_calls_are_read_and_ordinary_answers_are_not(name: str, text: str, calls: list[ToolCall]) -> None:
    try:
        folder = model_folder(name)
    except NotAvailable as error:
        pytest.skip(str(error))
    prompts = PromptTokenizer(str(folder), max_prompt_tokens=4096)
    parser = parser_of(prompts, PARSERS[name])
    assert list(parser.read([], prompts.tokenizer(text, add_special_tokens=False)["input_ids"]).calls) == calls
