"""Make the model of both games: a tiny untrained Llama with their words."""

from __future__ import annotations

from pathlib import Path

from examples.game.tictactoe import WORDS
from examples.tiny_model import write_tiny_model

LAKE_WORDS = ("S", "F", "H", "G", "P", "left", "down", "right", "up")


def build_model(directory: Path, *, seed: int) -> None:
    """Write the model with its tokenizer into the directory."""
    write_tiny_model(directory, (*WORDS, *LAKE_WORDS), seed=seed, num_heads=2, num_layers=2, max_positions=320)
