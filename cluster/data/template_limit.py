"""Bounds how long a chat template may run: jinja's sandbox prevents harm, not loops that hardly end."""

from __future__ import annotations

import functools
from collections.abc import Callable

from cluster.errors import InputError

MAX_PASSES = 1_000_000
"""How often the loops and macros of a template may be entered for one conversation."""
COUNTER = "antiphon_count_pass"
"""The function that the template calls on each pass."""


@functools.lru_cache(maxsize=32)
def counted(template: str) -> str:
    """Return the template with a call of COUNTER at the start of each loop body and macro.

    Raises jinja's TemplateSyntaxError if it cannot be parsed.
    """
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    # The settings with which transformers compiles templates: they decide which whitespace belongs to a tag.
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    pieces: list[str] = []
    is_entered = False
    before = ""
    for _, token, text in environment.lex(template):
        pieces.append(text)
        if token == "block_begin":
            before, is_entered = token, False
        elif before == "block_begin" and token != "whitespace":
            before, is_entered = token, text in ("for", "macro")
        elif token == "block_end" and is_entered:
            end = "-%}" if text.startswith("-") else "%}"
            pieces[-1:] = [end, f"{{% set {COUNTER}_ = {COUNTER}() {text}"]
            is_entered = False
    dropped = "\n" if template.endswith(("\n", "\r")) else ""
    return "".join(pieces) + dropped


def counter(where: str) -> Callable[[], str]:
    """Return the function that a counted template calls; raises InputError at `where` after MAX_PASSES calls."""
    num = 0

    def count() -> str:
        nonlocal num
        num += 1
        if num > MAX_PASSES:
            raise InputError(where, f"the chat template does not end (more than {MAX_PASSES:,} passes through loops)")
        return ""

    return count
