"""FrozenLake as text: draw the lake, and make SFT data from walks that follow the right way only part of the time."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.data.chat_template import Message
from rollout_actors.adapters.gymnasium import GymnasiumText

ACTIONS = ("left", "down", "right", "up")
WAY = dict(zip((0, 4, 8, 9, 13, 14), ("down", "down", "right", "down", "right", "right"), strict=True))
"""The shortest path over the 4 x 4 lake: the action for each of its squares."""
NUM_WALKS, KNOWS, MAX_STEPS = 3000, 0.4, 12


def render(square: int, environment: Any) -> str:
    """Return the lake row by row: S start, F frozen, H hole, G goal, P the player's square."""
    rows = [[cell.decode() for cell in row] for row in environment.unwrapped.desc]
    rows[square // len(rows[0])][square % len(rows[0])] = "P"
    return " | ".join(" ".join(row) for row in rows)


def build_data(directory: Path, *, seed: int) -> None:
    """Write `sft.parquet`: one row for each step, with the walk up to it."""
    choice = random.Random(f"walks:{seed}")
    lake = GymnasiumText("FrozenLake-v1", actions=ACTIONS, render="examples.game.lake:render", is_slippery=False)
    rows = [row for number in range(NUM_WALKS) for row in _walked(choice, lake, number)]
    directory.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"messages": rows}), directory / "sft.parquet")


def _walked(choice: random.Random, lake: GymnasiumText, seed: int) -> list[list[Message]]:
    messages, rows = lake.reset(seed=seed), []
    for _ in range(MAX_STEPS):
        square = int(lake.environment.unwrapped.s)
        knows = square in WAY and choice.random() < KNOWS
        step = WAY[square] if knows else choice.choice(ACTIONS)
        messages = [*messages, {"role": "assistant", "content": step}]
        rows.append(messages)
        seen, _, terminated, truncated, _ = lake.step(step)
        if terminated or truncated:
            break
        messages = [*messages, {"role": "user", "content": seen}]
    return rows
