"""The untrained model of all four tasks: their words together, and half as wide again as a task's own."""

from __future__ import annotations

from pathlib import Path

from examples.dialogue import clerk
from examples.question_answering import data as question_answering
from examples.reasoning import data as reasoning
from examples.tiny_model import write_tiny_model
from examples.translation import data as translation

WORDS = {*question_answering.WORDS, *reasoning.WORDS, *translation.WORDS, *clerk.WORDS}


def build_model(directory: Path, *, seed: int) -> None:
    """Write it as a Hugging Face folder."""
    write_tiny_model(directory, WORDS, seed=seed, num_heads=3, max_positions=160)
