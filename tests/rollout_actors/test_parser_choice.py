"""Tests of the parsers that fit a chat template."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster.errors import InputError
from rollout_actors.config import EnvironmentConfig
from rollout_actors.parser_choice import Parsers, choose_parsers, default_parsers, known_parsers, require_known


@pytest.mark.parametrize(
    ("template", "tokens", "expected"),
    [
        ("<tool_call> </think>", {"</think>"}, ("hermes", "deepseek_r1")),
        ("<tool_call> </think>", set(), ("hermes", "none")),
        ("<tool_call> <function= </think>", {"</think>"}, ("qwen3_xml", "deepseek_r1")),
        ("ipython", {"<|python_tag|>"}, ("llama3_json", "none")),
        ("ipython", set(), ("hermes", "none")),
        ("[TOOL_CALLS]", set(), ("mistral", "none")),
        ("[TOOL_CALLS] [THINK]", set(), ("mistral", "mistral")),
        ("<|channel|>", set(), ("openai", "openai_gptoss")),
        ("", set(), ("hermes", "none")),
    ],
)
def test_the_template_decides_on_the_parsers(template: str, tokens: set[str], expected: tuple[str, str]) -> None:
    assert default_parsers(template, tokens) == Parsers(*expected)
    for kind, name in (("tool", expected[0]), ("reasoning", expected[1])):
        require_known(kind, name)  # type: ignore[arg-type]


def test_settings_replace_the_choice_by_the_template(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": [{"content": "</think>"}]}))
    config = {"chat_template": [{"name": "default", "template": "x"}, {"name": "tool_use", "template": "[TOOL_CALLS]"}]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert choose_parsers(tmp_path, EnvironmentConfig()) == Parsers("mistral", "none")
    (tmp_path / "chat_template.jinja").write_text("<tool_call></think>")
    assert choose_parsers(tmp_path, EnvironmentConfig()) == Parsers("hermes", "deepseek_r1")
    named = EnvironmentConfig(tool_parser="pythonic", reasoning_parser="none")
    assert choose_parsers(tmp_path, named) == Parsers("pythonic", "none")


def test_a_misspelt_parser_is_named_with_similar_ones() -> None:
    assert {"hermes", "mistral", "llama3_json", "openai"} <= set(known_parsers("tool"))
    with pytest.raises(
        InputError, match=r"environment\.tool_parser: vLLM has no tool parser 'hermse'; did you mean hermes"
    ):
        require_known("tool", "hermse")
    with pytest.raises(InputError, match=r"environment\.reasoning_parser: .* there are .*deepseek_r1"):
        require_known("reasoning", "zzz")
