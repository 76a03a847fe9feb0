"""Write a run's settings: flat by dotted key, and as the resolved run file."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from deploy.config.schema import RunConfig


def flat(config: RunConfig) -> dict[str, Any]:
    """Return every setting by its dotted key; unset ones are None."""
    return dict(_flattened("", config.model_dump(mode="json")))


def _flattened(prefix: str, values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flattened(f"{prefix}{key}.", value)
        else:
            yield prefix + key, value


def to_toml(config: RunConfig) -> str:
    """Return the resolved run file: every setting with its value, defaults included, unset ones left out."""
    return "\n".join(_tables("", config.model_dump(mode="json", exclude_none=True))).strip() + "\n"


def _tables(name: str, table: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of a table: its own values first, because they would belong to a sub-table after its header."""
    if name:
        yield f"\n[{name}]"
    for key, value in table.items():
        if not isinstance(value, Mapping):
            yield f"{_key(key)} = {_toml(value)}"
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _tables(f"{name}.{_key(key)}" if name else _key(key), value)


def _key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else json.dumps(key)


def _toml(value: Any) -> str:
    """Format a value; numbers, texts and booleans are written in TOML as in JSON."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_key(key)} = {_toml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
