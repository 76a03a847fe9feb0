"""Make the untrained model of reasoning-gym's tasks; its tokenizer learns the words of their questions."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from examples.byte_model import write_byte_model
from examples.reasoning_gym.tasks import Tasks, tasks_of

NUM_SAMPLES = 500
"""Questions of each task from which the tokenizer learns."""


def build_model(directory: Path, *, seed: int, tasks: Tasks, **sizes: Any) -> None:
    """Write the model; `sizes` are those of `write_byte_model`."""
    write_byte_model(directory, _texts(tasks, seed), seed=seed, **sizes)


def _texts(tasks: Tasks, seed: int) -> Iterator[str]:
    for task in tasks_of(tasks):
        questions = task.questions(seed)
        for number in range(NUM_SAMPLES):
            item = questions[number]
            yield item["question"]
            yield str(item["answer"])
