"""Servers of a guessing game: one with the package openenv, one that implements its protocol by hand.

Run `python -m tests.support.openenv_server KIND PORT`. KIND is `openenv` or `contract`.
"""

# No `from __future__ import annotations`: both frameworks evaluate annotations inside functions.
import contextlib
import random
import sys
from typing import Any

import uvicorn


class Guess:
    """The game: guess a number from `low` to 9, drawn from the seed."""

    def reset(self, seed: int | None, low: int = 1) -> str:
        self.number = random.Random(seed).randint(low, 9)
        self.num_steps = 0
        return f"guess from {low} to 9"

    def step(self, guess: int) -> tuple[str, float, bool]:
        self.num_steps += 1
        if guess == 7777:
            raise RuntimeError("that guess breaks it")
        word = "right" if guess == self.number else "higher" if guess < self.number else "lower"
        return word, float(word == "right"), word == "right"


def contract() -> Any:
    """Return a server that implements the part of the protocol that a session needs."""
    from fastapi import FastAPI, WebSocket, WebSocketDisconnect

    app = FastAPI()

    @app.websocket("/ws")
    async def session(socket: WebSocket) -> None:
        await socket.accept()
        game = Guess()
        with contextlib.suppress(WebSocketDisconnect):
            while True:
                message = await socket.receive_json()
                await socket.send_json(_answer(game, message["type"], message.get("data", {})))

    return app


def _answer(game: Guess, kind: str, data: dict[str, Any]) -> dict[str, Any]:
    if kind == "state":
        return {"type": "state", "data": {"episode_id": "a", "step_count": game.num_steps}}
    if kind == "reset":
        word, reward, done = game.reset(data["seed"], data.get("low", 1)), None, False
    elif not isinstance(data.get("guess"), int) or set(data) - {"guess"}:
        error = {"loc": ["guess"], "msg": "Field required"}
        return {"type": "error", "data": {"message": "Invalid message", "code": "VALIDATION_ERROR", "errors": [error]}}
    else:
        try:
            word, reward, done = game.step(data["guess"])
        except RuntimeError as error:
            return {"type": "error", "data": {"message": str(error), "code": "EXECUTION_ERROR"}}
    return {"type": "observation", "data": {"observation": {"word": word}, "reward": reward, "done": done}}


def openenv() -> Any:
    """Return a server made with the package openenv."""
    from openenv.core.env_server import Action, ConcurrencyConfig, Environment, Observation, State, create_fastapi_app

    class GuessAction(Action):
        guess: int

    class GuessObservation(Observation):
        word: str

    class GuessEnvironment(Environment):
        SUPPORTS_CONCURRENT_SESSIONS = True

        def __init__(self) -> None:
            super().__init__()
            self._game = Guess()

        def reset(self, seed: int | None = None, episode_id: str | None = None, low: int = 1) -> GuessObservation:
            return GuessObservation(word=self._game.reset(seed, low))

        def step(self, action: GuessAction) -> GuessObservation:  # type: ignore[override]
            word, reward, done = self._game.step(action.guess)
            return GuessObservation(word=word, reward=reward, done=done)

        @property
        def state(self) -> State:
            return State(episode_id="a", step_count=self._game.num_steps)

    sessions = ConcurrencyConfig(max_concurrent_envs=8)
    return create_fastapi_app(GuessEnvironment, GuessAction, GuessObservation, concurrency_config=sessions)


if __name__ == "__main__":
    _, kind, port = sys.argv
    uvicorn.run({"contract": contract, "openenv": openenv}[kind](), host="127.0.0.1", port=int(port), log_level="error")
