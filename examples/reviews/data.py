"""Make the data sets of the reviews task from a seed: the SFT corpus, training prompts and held-out prompts."""

from __future__ import annotations

import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from examples.reviews.grammar import all_prompts, sample_review, topic_of

NUM_EVALUATION_PROMPTS = 512
NUM_SFT_ROWS = 8000


def build_data(directory: Path, *, seed: int) -> None:
    """Write `sft.parquet` (prompt, completion), `prompts.parquet` and `evaluation.parquet` (prompt).

    The grammar has 960 prompts: 512 are held out for evaluation, the other 448 are for training.
    """
    choice = random.Random(seed)
    prompts = all_prompts()
    choice.shuffle(prompts)
    held_out, training = prompts[:NUM_EVALUATION_PROMPTS], prompts[NUM_EVALUATION_PROMPTS:]
    asked = choice.choices(training, k=NUM_SFT_ROWS)
    completions = [sample_review(str(topic_of(prompt)), choice) for prompt in asked]
    directory.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"prompt": asked, "completion": completions}), directory / "sft.parquet")
    pq.write_table(pa.table({"prompt": training}), directory / "prompts.parquet")
    pq.write_table(pa.table({"prompt": held_out}), directory / "evaluation.parquet")
