"""Chooses vLLM's parsers of tool calls and thoughts by a model's chat template.

Reads files only: imports neither torch, transformers nor vllm.
"""

from __future__ import annotations

import ast
import difflib
import importlib.util
from collections.abc import Collection
from pathlib import Path
from typing import Literal, NamedTuple

from cluster.errors import InputError
from cluster.files import read_json
from rollout_actors.config import EnvironmentConfig

NONE = "none"
"""Value of either setting that reads nothing out of a response."""
Kind = Literal["tool", "reasoning"]
TABLES: dict[Kind, tuple[str, str]] = {
    "tool": ("tool_parsers", "_TOOL_PARSERS_TO_REGISTER"),
    "reasoning": ("reasoning", "_REASONING_PARSERS_TO_REGISTER"),
}
"""Folder of vLLM, and the name of its table of parsers, whose keys are their names."""
TOOL_PARSERS = {
    "<|channel|>": "openai",
    "[TOOL_CALLS]": "mistral",
    "<function=": "qwen3_xml",
    "<arg_key>": "glm45",
    "<|tool_calls_section_begin|>": "kimi_k2",
    "<｜tool▁calls▁begin｜>": "deepseek_v3",
    "<tool_call>": "hermes",
    "<|python_tag|>": "llama3_json",
    "ipython": "llama3_json",
}
"""Text of a template that teaches a form of calls -> tool parser of that form; the first that is there decides."""
REASONING_PARSERS = {"<|channel|>": "openai_gptoss", "[THINK]": "mistral", "</think>": "deepseek_r1"}
NEEDED_TOKENS = {"llama3_json": "<|python_tag|>", "deepseek_r1": "</think>"}
"""Parsers that fail unless the tokenizer has this token."""
DEFAULT_TOOL_PARSER = "hermes"


class Parsers(NamedTuple):
    """Names of a tool parser and a reasoning parser of vLLM, or `none`."""

    tool: str
    reasoning: str


def choose_parsers(folder: Path, config: EnvironmentConfig) -> Parsers:
    """Return the parsers that the settings name, or those that fit the chat template of the model folder."""
    default = default_parsers(template_of(folder), added_tokens(folder))
    return Parsers(config.tool_parser or default.tool, config.reasoning_parser or default.reasoning)


def default_parsers(template: str, tokens: Collection[str]) -> Parsers:
    """Return the parsers for a chat template and a tokenizer with these added tokens."""
    tool = next((name for text, name in TOOL_PARSERS.items() if text in template), DEFAULT_TOOL_PARSER)
    reasoning = next((name for text, name in REASONING_PARSERS.items() if text in template), NONE)
    usable = {name for name, token in NEEDED_TOKENS.items() if token in tokens}
    if tool in NEEDED_TOKENS and tool not in usable:
        tool = DEFAULT_TOOL_PARSER
    return Parsers(tool, NONE if reasoning in NEEDED_TOKENS and reasoning not in usable else reasoning)


def template_of(folder: Path) -> str:
    """Return the chat templates of a model folder in one text; empty if it has none."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    path = folder / "tokenizer_config.json"
    found = read_json(path).get("chat_template") if path.is_file() else None
    named = found if isinstance(found, list) else [{"template": found or ""}]
    return "\n".join(str(each["template"]) for each in named)


def added_tokens(folder: Path) -> set[str]:
    """Return the texts of the added tokens of a model folder's tokenizer."""
    path = folder / "tokenizer.json"
    return {token["content"] for token in read_json(path).get("added_tokens", ())} if path.is_file() else set()


def require_known(kind: Kind, name: str | None) -> None:
    """Raise InputError naming similar names unless vLLM has a parser of this kind and name.

    Reads the table of names in vLLM's source, which takes seconds to import.
    """
    known = known_parsers(kind)
    if name in (None, NONE) or not known or name in known:
        return
    similar = difflib.get_close_matches(str(name), known, n=3)
    hint = f"did you mean {' or '.join(similar)}?" if similar else f"there are {', '.join(sorted(known))}"
    raise InputError(f"environment.{kind}_parser", f"vLLM has no {kind} parser {name!r}; {hint}")


def known_parsers(kind: Kind) -> list[str]:
    """Return the names of vLLM's parsers of this kind; none if vLLM is not installed."""
    package, table = TABLES[kind]
    found = importlib.util.find_spec("vllm")
    if found is None or not found.submodule_search_locations:
        return []
    source = Path(found.submodule_search_locations[0]) / package / "__init__.py"
    tables = {
        node.targets[0].id: node.value
        for node in ast.parse(source.read_text(encoding="utf-8")).body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    found_table = tables.get(table)
    keys = found_table.keys if isinstance(found_table, ast.Dict) else []
    return [key.value for key in keys if isinstance(key, ast.Constant) and isinstance(key.value, str)]
