"""Make the untrained model of the translation task."""

from __future__ import annotations

from pathlib import Path

from examples.tiny_model import write_tiny_model
from examples.translation.data import WORDS


def build_model(directory: Path, *, seed: int) -> None:
    """Write the model as a Hugging Face folder."""
    write_tiny_model(directory, WORDS, seed=seed)
