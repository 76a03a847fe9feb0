"""Finds and replaces lone surrogates, which Python texts may hold but no encoding of Unicode has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def is_unicode(text: str) -> bool:
    """Return whether the text has no lone surrogate."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def as_unicode(value: Any) -> Any:
    """Return the value with U+FFFD in place of each lone surrogate in its texts."""
    if isinstance(value, str):
        return value if is_unicode(value) else value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, Mapping):
        return {as_unicode(key): as_unicode(each) for key, each in value.items()}
    return [as_unicode(each) for each in value] if isinstance(value, list | tuple) else value
