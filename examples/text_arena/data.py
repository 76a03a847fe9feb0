"""Make the model and the SFT data of a TextArena game: games in which both players make random moves that are allowed.

There are no prompts: they come from the environment.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.data.chat_template import Message
from examples.byte_model import write_byte_model
from examples.text_arena.game import TextArena, listed_move

NUM_SAMPLES = 200
"""Games from which the tokenizer learns."""


def build_model(directory: Path, *, seed: int, game: str, max_positions: int = 1024, **sizes: Any) -> None:
    """Write the untrained model; its tokenizer learns the words of the game. `sizes` are `write_byte_model`'s."""
    moves = islice(_moves(game, f"tokenizer:{seed}"), NUM_SAMPLES)
    texts = (message["content"] for messages in moves for message in messages)
    write_byte_model(directory, texts, seed=seed, max_positions=max_positions, **sizes)


def build_data(directory: Path, *, seed: int, game: str, num_moves: int = 8000) -> None:
    """Write `sft.parquet`: one row for each move, with the game up to it."""
    rows = list(islice(_moves(game, f"demonstrations:{seed}"), num_moves))
    directory.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"messages": rows}), directory / "sft.parquet")


def _moves(game: str, seed: str) -> Iterator[list[Message]]:
    """Play games without end; yield one conversation for each move, which ends with that move."""
    choice, arena = random.Random(seed), TextArena(game, show="last")
    while True:
        messages, is_over = arena.reset(seed=choice.getrandbits(31)), False
        while not is_over:
            move = listed_move(messages[-1]["content"], choice)
            messages = [*messages, {"role": "assistant", "content": move}]
            yield messages
            observation, _, is_over, _, _ = arena.step(move)
            messages = [*messages, {"role": "user", "content": observation}]
