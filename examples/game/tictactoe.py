"""Tic-tac-toe as text, against an opponent that makes each move perfectly or at random.

The policy plays x and begins about half of the games. Free squares are shown by their numbers, which are the moves.
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
    """Return the mark that has three in a row on a board of nine squares, or None."""
    return next((board[a] for a, b, c in LINES if board[a] != " " and board[a] == board[b] == board[c]), None)


def free(board: str) -> list[int]:
    """Return the free squares."""
    return [square for square, mark in enumerate(board) if mark == " "]


def after(board: str, square: int, mark: str) -> str:
    """Return the board after a mark is put on a square."""
    return board[:square] + mark + board[square + 1 :]


@cache
def value(board: str, mark: str) -> int:
    """Return the value of the board for the player to move if both play perfectly: 1 won, 0 drawn, -1 lost."""
    if winner(board):
        return -1
    other = "o" if mark == "x" else "x"
    return max((-value(after(board, square, mark), other) for square in free(board)), default=0)


def best_moves(board: str, mark: str) -> list[int]:
    """Return the squares that keep the board's value."""
    other, best = "o" if mark == "x" else "x", value(board, mark)
    return [square for square in free(board) if -value(after(board, square, mark), other) == best]


def shown(board: str) -> str:
    """Return the board as the policy reads it, row by row: the number of each square after its mark, if any."""
    cells = [f"{mark.strip()}{number}" for number, mark in enumerate(board, 1)]
    return " | ".join(" ".join(cells[row : row + 3]) for row in (0, 3, 6))


class TicTacToe:
    """Environment with one game per conversation. A response that is not the number of a free square loses."""

    def __init__(self, *, perfect_share: float = 0.5) -> None:
        """Let the opponent make this share of its moves perfectly, the others at random."""
        self._perfect_share = perfect_share

    def reset(self, *, seed: int) -> list[Message]:
        """Return the empty board, or the board after the opponent's first move."""
        self._choice = random.Random(seed)
        self._board = EMPTY
        if self._choice.random() < 0.5:
            self._opponent_moves()
        return [{"role": "user", "content": shown(self._board)}]

    def step(self, response: str) -> tuple[str, float, bool, bool, dict[str, float]]:
        """Return the board after both moves. The reward is 1 for a win, 0.5 for a draw, else 0."""
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
