"""Tic-tac-toe in text, against an opponent that plays perfectly or at random, move by move.

The policy is x and begins in every second game. A free square is shown by its number; the policy answers with one.
Knows neither models nor training.
"""

from __future__ import annotations

import random
from functools import cache

from cluster.data.chat_template import Message

LINES = ((0, 1, 2), (3, 4, 5), (6, 7, 8), (0, 3, 6), (1, 4, 7), (2, 5, 8), (0, 4, 8), (2, 4, 6))
EMPTY = " " * 9
OUTCOMES = ("won", "lost", "drawn", "illegal")
WORDS = (*(f"{mark}{square}" for mark in ("x", "o", "") for square in range(1, 10)), "|", *OUTCOMES)


def winner(board: str) -> str | None:
    """Who has three in a row, of the nine squares of a board."""
    return next((board[a] for a, b, c in LINES if board[a] != " " and board[a] == board[b] == board[c]), None)


def free(board: str) -> list[int]:
    """The squares that nobody has."""
    return [square for square, mark in enumerate(board) if mark == " "]


def after(board: str, square: int, mark: str) -> str:
    """The board when a mark was put on a square."""
    return board[:square] + mark + board[square + 1 :]


@cache
def value(board: str, mark: str) -> int:
    """What the board is worth to the one who moves now, both playing perfectly: 1 won, 0 drawn, -1 lost."""
    if winner(board):
        return -1
    other = "o" if mark == "x" else "x"
    return max((-value(after(board, square, mark), other) for square in free(board)), default=0)


def best_moves(board: str, mark: str) -> list[int]:
    """The squares that keep the board's value."""
    other, best = "o" if mark == "x" else "x", value(board, mark)
    return [square for square in free(board) if -value(after(board, square, mark), other) == best]


def shown(board: str) -> str:
    """The board as the policy reads it, row by row: the number of each square, behind the mark of who has it."""
    cells = [f"{mark.strip()}{number}" for number, mark in enumerate(board, 1)]
    return " | ".join(" ".join(cells[row : row + 3]) for row in (0, 3, 6))


class TicTacToe:
    """One game after another. A move that is none, or no free square, loses the game."""

    def __init__(self, *, perfect_share: float = 0.5) -> None:
        """The opponent makes this share of its moves perfectly, the others at random."""
        self._perfect_share = perfect_share

    def reset(self, *, seed: int) -> list[Message]:
        """The empty board, or what it is when the opponent has begun."""
        self._choice = random.Random(seed)
        self._board = EMPTY
        if self._choice.random() < 0.5:
            self._opponent_moves()
        return [{"role": "user", "content": shown(self._board)}]

    def step(self, response: str) -> tuple[str, float, bool, bool, dict[str, float]]:
        """The board after both moves; 1 for a win, 0.5 for a draw, and 0 else."""
        move = response.strip()
        if move not in "123456789" or len(move) != 1 or int(move) - 1 not in free(self._board):
            return self._over("illegal")
        self._board = after(self._board, int(move) - 1, "x")
        if winner(self._board):
            return self._over("won")
        if free(self._board):
            self._opponent_moves()
        if winner(self._board):
            return self._over("lost")
        if not free(self._board):
            return self._over("drawn")
        return shown(self._board), 0.0, False, False, {}

    def _opponent_moves(self) -> None:
        is_perfect = self._choice.random() < self._perfect_share
        moves = best_moves(self._board, "o") if is_perfect else free(self._board)
        self._board = after(self._board, self._choice.choice(moves), "o")

    def _over(self, how: str) -> tuple[str, float, bool, bool, dict[str, float]]:
        reward = {"won": 1.0, "drawn": 0.5}.get(how, 0.0)
        not_lost, won, legal = how in ("won", "drawn"), how == "won", how != "illegal"
        info = {"not_lost": float(not_lost), "won": float(won), "legal": float(legal)}
        return how, reward, True, False, info
