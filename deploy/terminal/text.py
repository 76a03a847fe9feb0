"""Make text safe to print."""

from __future__ import annotations


def visible(text: str) -> str:
    """The text with its control characters written out, so that none of them steers the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)
