"""Format text, numbers and paths for the terminal."""

from __future__ import annotations

import os
from pathlib import Path


def visible(text: str) -> str:
    """Return the text with control characters escaped, so that it cannot control the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


def number(value: float | None, form: str, missing: str = "") -> str:
    """Return the number in a format such as ".4f", or `missing` if there is none."""
    return missing if value is None else format(value, form)


def short_path(path: Path) -> str:
    """Return the path relative to the working directory if it is inside, otherwise as given."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative
