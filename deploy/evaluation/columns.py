"""The columns of a data set that a user's function takes by name, beside the texts it gets by position.

Scorers have the same of `reward_service.scorers.signatures`; this is for what the driver calls itself.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cluster.errors import InputError


def columns_for(
    function: Callable[..., Any], rows: Sequence[Mapping[str, Any]], key: str, *, num_texts: int
) -> dict[str, list[Any]]:
    """The columns other than the prompt that the function names, or all where it takes `**columns`; a value a row.

    The first `num_texts` parameters are not columns. Raises InputError at the run file's `key` where one that the
    function can't do without is missing.
    """
    texts, named, takes_all = _parameters(function, num_texts)
    held = [name for name in rows[0] if name != "prompt" and name not in texts]
    for name, is_needed in named.items():
        if is_needed and name not in held:
            what = f"needs a column {name!r}; beside the prompts there is {', '.join(held) or 'none'}"
            raise InputError(key, what)
    return {name: [row.get(name) for row in rows] for name in held if takes_all or name in named}


def _parameters(function: Callable[..., Any], num_texts: int) -> tuple[set[str], dict[str, bool], bool]:
    """Names of the texts, of the others with whether they are needed, and whether any name is taken."""
    parameters = list(inspect.signature(function).parameters.values())
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    plain = [p for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    named = {p.name: p.default is p.empty for p in plain[num_texts:]}
    return {p.name for p in plain[:num_texts]}, named, takes_all
