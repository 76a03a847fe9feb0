"""Bounds the number of tokens of a text by its bytes, so that most prompts need not be encoded to know that they fit.

A token stands for at least one byte of the text. Imports neither torch nor transformers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

EXPANSION = 18
"""The most characters into which Unicode's normal forms change one."""


class TokenBound:
    """The bound of one tokenizer; infinite if its parts are not known to keep it."""

    def __init__(self, folder: Path) -> None:
        tokenizer, settings = _read(folder / "tokenizer.json"), _read(folder / "tokenizer_config.json") or {}
        self._factor, self._num_added = math.inf, math.inf
        if tokenizer is not None:
            factor, num_prefix = _expansion(tokenizer.get("normalizer"))
            self._factor = factor
            self._num_added = num_prefix + _num_special(tokenizer.get("post_processor"))
            self._num_added += _num_spaces(tokenizer.get("pre_tokenizer"))
            self._num_added += sum(bool(settings.get(name)) for name in ("add_bos_token", "add_eos_token"))

    def of(self, text: str) -> float:
        """Return the most tokens that the text may have, with the special tokens around it."""
        if text.isascii():
            num = len(text) if self._factor < math.inf else math.inf
        else:
            num = len(text.encode("utf-8", "surrogatepass")) * self._factor
        return num + self._num_added


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _expansion(normalizer: Mapping[str, Any] | None) -> tuple[float, int]:
    """Return how many times longer a normalizer may make a text that is not ASCII, and the characters it puts before.

    ASCII texts stay as long as they are.
    """
    if normalizer is None:
        return 1, 0
    kind = normalizer.get("type")
    if kind == "Sequence":
        parts = [_expansion(part) for part in normalizer.get("normalizers", ())]
        return math.prod(factor for factor, _ in parts), sum(num for _, num in parts)
    if kind == "Prepend":
        return 1, len(str(normalizer.get("prepend")).encode())
    if kind == "Replace":
        return (1 if len(str(normalizer.get("content"))) <= 1 else math.inf), 0
    if kind in ("Strip", "StripAccents"):
        return 1, 0
    return (EXPANSION if kind in ("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Precompiled") else math.inf), 0


def _num_special(processor: Mapping[str, Any] | None) -> float:
    """Return how many special tokens a post-processor puts around a text."""
    if processor is None:
        return 0
    kind = processor.get("type")
    if kind == "Sequence":
        return sum(map(_num_special, processor.get("processors", ())))
    if kind == "TemplateProcessing":
        return sum("SpecialToken" in part for part in processor.get("single", ()))
    return {"ByteLevel": 0, "BertProcessing": 2, "RobertaProcessing": 2}.get(str(kind), math.inf)


def _num_spaces(pre_tokenizer: Mapping[str, Any] | None) -> int:
    """Return how many spaces a pre-tokenizer puts before a text."""
    if pre_tokenizer is None:
        return 0
    if pre_tokenizer.get("type") == "Sequence":
        return sum(map(_num_spaces, pre_tokenizer.get("pretokenizers", ())))
    is_added = pre_tokenizer.get("add_prefix_space") or pre_tokenizer.get("prepend_scheme", "never") != "never"
    return 3 if is_added else 0
