"""Make the untrained model of all four tasks: their words together, 1.5 times as wide as the model of one task."""

from __future__ import annotations

from pathlib import Path

from examples.dialogue import clerk
from examples.question_answering import data as question_answering
from examples.reasoning import data as reasoning
from examples.tiny_model import write_tiny_model
from examples.translation import data as translation

WORDS = {*question_answering.WORDS, *reasoning.WORDS, *translation.WORDS, *clerk.WORDS}


def build_model(directory: Path, *, seed: int) -> None:
    """Write the model as a Hugging Face folder."""
    write_tiny_model(directory, WORDS, seed=seed, num_heads=3, max_positions=160)
