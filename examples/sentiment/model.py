"""Make the untrained model of the sentiment task."""

from __future__ import annotations

from pathlib import Path

from examples.sentiment.data import WORDS
from examples.tiny_model import write_tiny_model


def build_model(directory: Path, *, seed: int) -> None:
    """Write the model as a Hugging Face folder."""
    write_tiny_model(directory, WORDS, seed=seed)
