"""Finds the fenced block of a response with a Markdown parser."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import regex
from markdown_it import MarkdownIt

_PARSER = MarkdownIt("zero").enable(["fence", "list", "blockquote"])
_PARSER.core.ruler.enableOnly(["normalize", "block"])
_BEHIND_TEXT = regex.compile(r"[^`]*\S[^`]*(?<start>)```+[\w+-]*\s*")
_LIST_MARK = regex.compile(r"\s*(?:[-*+>]|\d+[.)])\s*")
_MAX_REWRITES = 16


PYTHON = ("python", "python3", "py", "py3")


def last_block(response: str, languages: Sequence[str] = ()) -> str:
    """Return the content of the response's last fenced block that is not empty, or the response without one.

    A block that is marked as one of `languages` comes before others: an example of its output may stand behind code.
    A fence is ``` or ~~~, may be indented by any width, and extends to the end of the response if it is not closed. An
    opening ``` behind text on its line counts too (the first 16 of a response).
    """
    lines = response.replace("\r\n", "\n").split("\n")
    tokens = _fences(lines)
    for _ in range(_MAX_REWRITES):
        fenced = {line for token in tokens for line in range(*token.map)}
        found = next((i for i, line in enumerate(lines) if i not in fenced and _opening(line) is not None), None)
        if found is None:
            break
        start = _opening(lines[found])
        lines[found : found + 1] = [lines[found][:start], lines[found][start:]]
        tokens = _fences(lines)
    blocks = [token for token in tokens if token.content.strip()]
    marked = [token for token in blocks if token.info.strip().split(" ")[0].lower() in languages]
    return (marked or blocks)[-1].content if blocks else response


def _fences(lines: Sequence[str]) -> list[Any]:
    return [token for token in _PARSER.parse("\n".join(lines)) if token.type == "fence"]


def _opening(line: str) -> int | None:
    """Return the position of an opening fence behind text at the end of a line, or None."""
    match = _BEHIND_TEXT.fullmatch(line)
    start = match.start("start") if match else 0
    return start if match and not _LIST_MARK.fullmatch(line[:start]) else None
