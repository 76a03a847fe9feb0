"""Marks in the text of a chat template which message each pass of its loops is about."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any

MARKER = "antiphon_mark"
"""The function that a marked template calls with the value of a loop."""
MARK = "\uf8ff"
"""Encloses the number of a message in the text of a marked template."""


class NumberedMessage(dict[str, Any]):
    """A message that a marked template recognises, also as a copy."""

    number = 0


def numbered(messages: Iterable[Mapping[str, Any]]) -> list[NumberedMessage]:
    """Return copies of the messages with their numbers."""
    copies = [NumberedMessage(message) for message in messages]
    for number, message in enumerate(copies):
        message.number = number
    return copies


def mark(value: Any) -> str:
    """Return the mark of a numbered message, or an empty text for other values."""
    return f"{MARK}{value.number}{MARK}" if isinstance(value, NumberedMessage) else ""


@functools.lru_cache(maxsize=32)
def marked_template(template: str) -> str:
    """Return the template with a call of MARKER at the start of each body of a loop over a single value."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    # The settings with which transformers compiles templates: they decide which whitespace belongs to a tag.
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    pieces: list[str] = []
    words: list[str] | None = None
    for _, token, text in environment.lex(template):
        pieces.append(text)
        if token == "block_begin":
            words = []
        elif token == "block_end" and words is not None:
            if words[:1] == ["for"] and words[2:3] == ["in"]:
                end = "-%}" if text.startswith("-") else "%}"
                # The tag behind the call ends like the loop's, which decides on the whitespace that follows.
                pieces[-1:] = [end, f"{{{{ {MARKER}({words[1]}) }}}}{{% set {MARKER}_ = 0 {text}"]
            words = None
        elif words is not None and token != "whitespace":
            words.append(text)
    return "".join(pieces) + ("\n" if template.endswith(("\n", "\r")) else "")
