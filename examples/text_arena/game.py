"""Play a two-player game of TextArena as an environment: the policy against an opponent that never learns."""

from __future__ import annotations

import contextlib
import functools
import random
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

from cluster import user_code
from cluster.data.chat_template import Message
from cluster.errors import InputError

MOVE = re.compile(r"\[[^\[\]]+\]")
LISTED = re.compile(r"available (?:moves|actions)[^:]*:(.*)", re.IGNORECASE | re.DOTALL)
OUTCOMES = {1: 1.0, 0: 0.5, -1: 0.0}
"""TextArena's reward of a player -> the policy's: won, drawn, lost."""
Opponent = Callable[[str, random.Random], str]


class TextArena:
    """Environment with one game per conversation; which seat the policy has is drawn from the seed."""

    def __init__(
        self,
        game: str,
        *,
        opponent: str = "random",
        show: Literal["all", "last"] = "all",
        max_turns: int = 100,
        **settings: Any,
    ) -> None:
        """Make a game by its TextArena name, such as ``TicTacToe-v0``; other settings are the game's own.

        `opponent` is ``random``, which plays one of the moves that the game lists, or the dotted path of
        `f(observation, choice: random.Random) -> move` for games that list none. After the first turn the policy sees
        all new messages, or only the last one, usually the board. Raises InputError for an unknown game.
        """
        import textarena

        try:
            self._make = functools.partial(textarena.make, f"{game.removesuffix('-raw')}-raw", **settings)
            self._game = self._make()
        except (ValueError, TypeError) as error:
            raise InputError("environment.settings.game", f"TextArena cannot make {game!r}: {error}") from error
        key = "environment.settings.opponent"
        self._opponent: Opponent = listed_move if opponent == "random" else user_code.load(opponent, key)
        self._show = show
        self._max_turns = max_turns

    def reset(self, *, seed: int) -> list[Message]:
        """Return the rules and the board, after the opponent's move if it begins."""
        self._choice = random.Random(seed)
        self._state = random.Random(seed).getstate()
        self._seat = self._choice.randrange(2)
        self._num_turns = 0
        with self._randomness():
            self._game = self._make()  # some games keep a deck of cards as the last game left it
            self._game.reset(num_players=2, seed=seed)
            self._until_own_turn()
        return [{"role": "user", "content": self._seen}]

    def step(self, response: str) -> tuple[str, float, bool, bool, dict[str, float]]:
        """Return what the policy sees next; the reward at the end is 1 for a win, 0.5 for a draw, else 0."""
        self._num_turns += 1
        with self._randomness():
            done, _ = self._game.step(as_move(response))
            if done or self._until_own_turn():
                return self._over()
        return self._seen, 0.0, False, self._num_turns >= self._max_turns, {}

    def _until_own_turn(self) -> bool:
        """Let the opponent move while it is its turn; return whether the game is over."""
        while True:
            player, messages = self._game.get_observation()
            if player == self._seat:
                is_short = self._show == "last" and self._num_turns > 0
                self._seen = rendered(messages[-1:] if is_short else messages, player)
                return False
            done, _ = self._game.step(as_move(self._opponent(rendered(messages, player), self._choice)))
            if done:
                return True

    def _over(self) -> tuple[str, float, bool, bool, dict[str, float]]:
        rewards, info = self._game.close()
        mine = info[self._seat]
        reward = OUTCOMES[max(-1, min(1, rewards[self._seat]))]
        parts = {"won": float(reward == 1), "not_lost": float(reward > 0), "legal": float(not mine["invalid_move"])}
        return str(mine["reason"]), reward, True, False, parts

    @contextlib.contextmanager
    def _randomness(self) -> Iterator[None]:
        """Give the game its own state of the module `random`, which TextArena draws from and seeds."""
        outside = random.getstate()
        random.setstate(self._state)
        try:
            yield
        finally:
            self._state = random.getstate()
            random.setstate(outside)


def rendered(messages: Sequence[tuple[int, str, Any]], player: int) -> str:
    """Return what a player has not seen yet as text; its own moves are left out."""
    texts = [
        text.strip() if sender < 0 else f"Player {sender}: {text.strip()}"
        for sender, text, _ in messages
        if sender != player
    ]
    return "\n".join(text for text in texts if text)


def as_move(response: str) -> str:
    """Return a response in the form of TextArena's moves: in brackets."""
    return response if MOVE.search(response) else f"[{response.strip()}]"


def listed_move(observation: str, choice: random.Random) -> str:
    """Return one of the moves that the game lists last, such as ``[4]``. Raises ValueError if it lists none."""
    *_, listed = LISTED.findall(observation) or [""]
    moves: list[str] = MOVE.findall(listed)
    if not moves:
        raise ValueError("the game lists no available moves: set environment.settings.opponent to a function")
    return choice.choice(moves)
