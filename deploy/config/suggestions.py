"""Suggest a setting for an unknown key: one with a similar name, or the one that another trainer calls so."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from pydantic import BaseModel

from deploy.config.peer_names import NOT_OFFERED, PEER_NAMES


def suggest(key: str, siblings: Iterable[str] = ()) -> str:
    """Return " (did you mean ...?)" for a dotted key, or why no such setting exists, or "".

    `siblings` are the keys of its own section.
    """
    name = _last(key)
    ours = [setting for setting, names in PEER_NAMES.items() if name in names]
    ours = ours or [setting for setting, names in PEER_NAMES.items() if name in map(_last, names)]
    ours = [setting for setting in ours if setting.partition(".")[0] == key.partition(".")[0]] or ours
    if ours:
        return f" (did you mean {' or '.join(ours[:3])}?)"
    for other, why in NOT_OFFERED.items():
        if name == _last(other):
            return f" ({why})"
    similar = difflib.get_close_matches(name, list(siblings), n=1)
    if similar:
        return f" (did you mean {similar[0]}?)"
    similar = difflib.get_close_matches(key, _settings(), n=2, cutoff=0.75)
    return f" (did you mean {' or '.join(similar)}?)" if similar else ""


def _last(name: str) -> str:
    """Return the last part of a dotted name or a flag."""
    return name.rpartition(".")[2].lstrip("-")


def _settings() -> list[str]:
    """Return every section and setting of the run file that has a fixed key."""
    from deploy.config.schema import RunConfig

    return list(_keys(RunConfig, ""))


def _keys(section: type[BaseModel], prefix: str) -> Iterable[str]:
    for name, field in section.model_fields.items():
        yield f"{prefix}{name}"
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _keys(field.annotation, f"{prefix}{name}.")
