"""Loads the tokenizer of a model folder with the folder's chat settings and stop tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cluster.data.chat_settings import ChatSettings, end_ids
from cluster.errors import InputError


def load_tokenizer(folder: Path) -> Any:
    """Load the tokenizer of a model folder, with the folder's chat settings. Raises InputError if there is none."""
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise InputError(str(folder), f"has no usable tokenizer: {error}") from error
    tokenizer.chat_settings = ChatSettings.of(folder)
    tokenizer.answer_end_ids = end_ids(folder, tokenizer)
    return tokenizer
