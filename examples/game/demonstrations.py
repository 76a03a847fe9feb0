"""Make the SFT data of tic-tac-toe from a seed: games of a player that knows the rules and often plays at random.

There are no prompts: they come from the environment.
"""

from __future__ import annotations

import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.data.chat_template import Message
from examples.game.tictactoe import TicTacToe, best_moves, free

NUM_GAMES = 6000
PERFECT_SHARE = 0.75


def build_data(directory: Path, *, seed: int) -> None:
    """Write `sft.parquet`: one row for each move, with the game up to it."""
    choice = random.Random(f"demonstrations:{seed}")
    rows = [row for game in range(NUM_GAMES) for row in _played(choice, seed * NUM_GAMES + game)]
    directory.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"messages": rows}), directory / "sft.parquet")


def _played(choice: random.Random, seed: int) -> list[list[Message]]:
    """Play a game; return one conversation for each of the player's moves, which ends with that move."""
    game = TicTacToe()
    messages, rows, is_over = game.reset(seed=seed), [], False
    while not is_over:
        board = game._board
        squares = best_moves(board, "x") if choice.random() < PERFECT_SHARE else free(board)
        move = str(choice.choice(squares) + 1)
        messages = [*messages, {"role": "assistant", "content": move}]
        rows.append(messages)
        observation, _, is_over, _, _ = game.step(move)
        messages = [*messages, {"role": "user", "content": observation}]
    return rows
