"""Reads thoughts and calls of functions in responses with vLLM's parsers, as vLLM's server does."""

from __future__ import annotations

import base64
import json
import logging
import os
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cluster.errors import InputError
from rollout_actors.tool_calls import THOUGHTS, ParsedResponse, ToolCall, make_call, read_calls, without_thoughts

TOOL_KEY, REASONING_KEY = "environment.tool_parser", "environment.reasoning_parser"
HARMONY = "openai"
"""vLLM's name of the tool parser for gpt-oss, which reads whole responses in channels."""
HARMONY_VOCABULARY = "o200k_base.tiktoken"
NONE = "none"
MARK_NAMES = ("tool_call_start_token", "bot_token")
"""Attributes in which vLLM's tool parsers keep the mark in front of a call; some formats have none."""


class VllmResponseParser:
    """Reads responses with the tool parser and the reasoning parser of these names.

    `schemas` are the functions that the policy may call. Raises InputError if there is no such parser, or if one does
    not work with the tokenizer.
    """

    def __init__(
        self,
        tokenizer: Any,
        tool_parser: str,
        reasoning_parser: str,
        *,
        schemas: Sequence[Mapping[str, Any]],
        end_ids: Collection[int],
    ) -> None:
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

        logging.getLogger("vllm.tool_parsers").setLevel(logging.CRITICAL)  # a malformed call is the policy's error
        self._tokenizer, self._end_ids = tokenizer, frozenset(end_ids)
        self._special_ids = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._names = frozenset(schema["function"]["name"] for schema in schemas)
        self._request = ChatCompletionRequest(
            messages=[{"role": "user", "content": ""}], model="", tools=list(schemas) or None
        )
        self._harmony = _harmony_parser(tokenizer) if tool_parser == HARMONY else None
        self._tool_parser = None
        self._marks = THOUGHTS
        if tool_parser not in (HARMONY, NONE):
            self._tool_parser = _tool_parser(tokenizer, tool_parser, self._request)
            self._marks = _thought_marks(tokenizer, reasoning_parser)

    def read(self, before: Sequence[int], token_ids: Sequence[int]) -> ParsedResponse:
        """Return what a response consists of; `before` are the tokens of its prompt."""
        if self._harmony is not None:
            return self._read_harmony(token_ids)
        text = self._text(token_ids)
        thoughts, content = without_thoughts(text, self._marks, is_open=self._is_open(before))
        calls, start = self._calls(content)
        if calls and text.endswith(content):
            text = text.removesuffix(content) + start.rstrip()
        return ParsedResponse(text, thoughts, calls)

    def _text(self, token_ids: Sequence[int]) -> str:
        ids = list(token_ids)
        while ids and ids[-1] in self._end_ids:
            ids.pop()
        return str(self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def _is_open(self, before: Sequence[int]) -> bool:
        """Return whether thoughts start in the prompt, behind its last special token: that of the policy's header."""
        start, end = (self._tokenizer.convert_tokens_to_ids(mark) for mark in self._marks)
        ends = self._special_ids | {start, end}
        last = next((token for token in reversed(before) if token in ends), None)
        return last is not None and last == start != self._tokenizer.unk_token_id

    def _calls(self, content: str) -> tuple[list[ToolCall], str]:
        """Return the calls in a response without its thoughts, and the text before the first."""
        if self._tool_parser is None or not self._names:
            return [], content
        mark = next(filter(None, (getattr(self._tool_parser, name, None) for name in MARK_NAMES)), None)
        try:
            found = self._tool_parser.extract_tool_calls(content, self._request)
        except Exception as error:  # noqa: BLE001  boundary to vLLM: the policy gets the error as a result
            return [ToolCall("", {}, f"the call cannot be read ({error})")], content
        calls = [make_call(call.function.name, call.function.arguments) for call in found.tool_calls]
        if mark and mark not in content and not all(call.name in self._names for call in calls):
            return [], content
        if calls:
            return calls, found.content or ""
        calls = read_calls(content, self._names, **({"mark": mark} if mark else {}))
        return calls, content.partition(mark)[0] if mark and mark in content else "" if calls else content

    def _read_harmony(self, token_ids: Sequence[int]) -> ParsedResponse:
        assert self._harmony is not None
        try:
            thoughts, content, found = self._harmony(self._tokenizer).parse(
                "", self._request, enable_auto_tools=True, model_output_token_ids=list(token_ids)
            )
        except Exception as error:  # noqa: BLE001  boundary to vLLM: the policy gets the error as a result
            return ParsedResponse("", "", [ToolCall("", {}, f"the call cannot be read ({error})")], has_channels=True)
        calls = [make_call(call.name, call.arguments) for call in found or ()]
        return ParsedResponse(content or "", thoughts or "", calls, has_channels=True)


def _tool_parser(tokenizer: Any, name: str, request: Any) -> Any:
    from vllm.tool_parsers import ToolParserManager

    if name not in ToolParserManager.list_registered():
        raise InputError(TOOL_KEY, f"vLLM has no tool parser {name!r}, only {_listed(ToolParserManager)}")
    try:
        return ToolParserManager.get_tool_parser(name)(tokenizer, request.tools)
    except (RuntimeError, ValueError, TypeError, KeyError, NotImplementedError) as error:
        raise InputError(TOOL_KEY, f"{name} does not work with the model's tokenizer: {error}") from error


def _thought_marks(tokenizer: Any, name: str) -> tuple[str, str]:
    """Return the marks around thoughts of the reasoning parser of that name."""
    from vllm.reasoning import ReasoningParserManager

    if name == NONE:
        return THOUGHTS
    if name not in ReasoningParserManager.list_registered():
        known = _listed(ReasoningParserManager)
        raise InputError(REASONING_KEY, f"vLLM has no reasoning parser {name!r}, only {known}")
    try:
        parser = ReasoningParserManager.get_reasoning_parser(name)(tokenizer)
    except (RuntimeError, ValueError, TypeError, KeyError, NotImplementedError) as error:
        raise InputError(REASONING_KEY, f"{name} does not work with the model's tokenizer: {error}") from error
    start, end = parser.reasoning_start_str, parser.reasoning_end_str
    if not start or not end:
        raise InputError(REASONING_KEY, f"{name} has no marks around thoughts; use one that has, such as deepseek_r1")
    return start, end


def _listed(manager: Any) -> str:
    return ", ".join(sorted(manager.list_registered()))


def _harmony_parser(tokenizer: Any) -> Any:
    """Return vLLM's parser of gpt-oss, which needs the model's vocabulary as a file that is otherwise downloaded."""
    from openai_harmony import HarmonyError
    from vllm.entrypoints.openai.parser.harmony_utils import get_encoding
    from vllm.parser.parser_manager import ParserManager

    try:
        with _vocabulary_file(tokenizer):
            get_encoding()
    except (HarmonyError, KeyError) as error:
        what = f"{HARMONY} reads the tokens of gpt-oss, and the model's tokenizer has others ({error})"
        raise InputError(TOOL_KEY, what) from error
    return ParserManager.get_parser(HARMONY, "openai_gptoss", enable_auto_tools=True, is_harmony=True)


@contextmanager
def _vocabulary_file(tokenizer: Any) -> Iterator[None]:
    """Write the tokenizer's vocabulary to where openai_harmony looks for it, so that it downloads nothing."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    name = "TIKTOKEN_ENCODINGS_BASE"
    before = os.environ.get(name)
    to_byte = {character: byte for byte, character in bytes_to_unicode().items()}
    vocabulary = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["vocab"]
    with tempfile.TemporaryDirectory() as folder:
        with (Path(folder) / HARMONY_VOCABULARY).open("wb") as file:
            for word, number in sorted(vocabulary.items(), key=lambda item: item[1]):
                text = base64.b64encode(bytes(to_byte[character] for character in word))
                file.write(text + f" {number}\n".encode())
        os.environ[name] = folder
        try:
            yield
        finally:
            os.environ.pop(name)
            os.environ.update({} if before is None else {name: before})
