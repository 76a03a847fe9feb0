"""Make the prompts of the letters task from a seed: eight random characters of `bcdefgh` and a colon."""

from __future__ import annotations

import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

PROMPT_CHARACTERS = "bcdefgh"
PROMPT_LENGTH = 8
NUM_PROMPTS = 4096
NUM_EVALUATION_PROMPTS = 512


def build_data(directory: Path, *, seed: int) -> None:
    """Write `prompts.parquet` and `evaluation.parquet` (column prompt). All prompts are different."""
    choice = random.Random(seed)
    prompts: dict[str, None] = {}
    while len(prompts) < NUM_PROMPTS + NUM_EVALUATION_PROMPTS:
        prompts["".join(choice.choices(PROMPT_CHARACTERS, k=PROMPT_LENGTH)) + ":"] = None
    rows = list(prompts)
    directory.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"prompt": rows[:NUM_PROMPTS]}), directory / "prompts.parquet")
    pq.write_table(pa.table({"prompt": rows[NUM_PROMPTS:]}), directory / "evaluation.parquet")
