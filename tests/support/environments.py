"""Environments for tests, a correct one and many faulty ones, named by dotted path."""

from __future__ import annotations

import asyncio
import os
import random
import time
from typing import Any


class Echo:
    """Starts with a word drawn from the seed, counts the responses and rewards each with its length."""

    def __init__(self, *, num_turns: int = 2, in_messages: bool = True) -> None:
        self.num_turns = num_turns
        self.in_messages = in_messages
        self.responses: list[str] = []

    def reset(self, *, seed: int, **columns: Any) -> Any:
        self.responses = []
        word = random.Random(seed).choice(("ab", "cd", "ef", "gh")) + str(columns.get("word", ""))
        return [{"role": "user", "content": word}] if self.in_messages else word

    def step(self, response: str) -> Any:
        self.responses.append(response)
        is_over = len(self.responses) == self.num_turns
        return f"{len(self.responses)}ok", float(len(response)), is_over, False, {"answers": len(self.responses)}


class Silent(Echo):
    """Gives the same observation to every response."""

    def step(self, response: str) -> Any:
        _, reward, terminated, truncated, info = super().step(response)
        return "~", reward, terminated, truncated, info


class AsyncEcho(Echo):
    """Echo with `async` methods."""

    async def reset(self, *, seed: int, **columns: Any) -> Any:  # type: ignore[override]
        await asyncio.sleep(0)
        return super().reset(seed=seed, **columns)

    async def step(self, response: str) -> Any:  # type: ignore[override]
        await asyncio.sleep(0)
        return super().step(response)


class Odd(Echo):
    """Breaks the protocol in `step`, or in `reset`, in the way that `how` names."""

    def __init__(self, how: str, **settings: Any) -> None:
        super().__init__(**settings)
        self.how = how

    def reset(self, *, seed: int, **columns: Any) -> Any:
        if self.how.startswith("reset "):
            return {"reset nothing": None, "reset empty": [], "reset no role": [{"content": "a"}], "reset text": ""}[
                self.how
            ]
        return super().reset(seed=seed, **columns)

    def step(self, response: str) -> Any:
        match self.how:
            case "raises":
                raise RuntimeError("no luck")
            case "hangs":
                time.sleep(3600)
            case "dawdles":
                time.sleep(0.5)
            case "crashes":
                os._exit(7)
            case "prints":
                print("output of an environment")
            case "four values":
                return "a", 1.0, True, False
            case "no reward":
                return "a", None, True, False, {}
            case "not finite":
                return "a", float("nan"), True, False, {}
            case "no flag":
                return "a", 0.0, "yes", False, {}
            case "no info":
                return "a", 0.0, True, False, None
            case "no observation":
                return 7, 0.0, False, False, {}
            case "gymnasium's":
                import numpy as np

                return "a", np.float32(0.5), np.bool_(True), np.bool_(False), {"x": np.float64(2.0), "text": "y"}
        return super().step(response)


class Adder(Echo):
    """Offers tools: one that works and two that raise."""

    def tools(self) -> list[Any]:
        return [add, fail, explode]


def add(first: int, second: int) -> int:
    """Add two numbers.

    Args:
        first: the first number
        second: the second number
    """
    return first + second


def fail(why: str) -> str:
    """Raise a ValueError.

    Args:
        why: the reason
    """
    raise ValueError(why)


def explode() -> str:
    """Raise a RuntimeError."""
    raise RuntimeError("boom")


def undocumented(x):  # type: ignore[no-untyped-def]
    return x


class BadTools(Echo):
    """Offers a function without type hints and documentation."""

    def tools(self) -> list[Any]:
        return [undocumented]


class NoStep:
    """Has no method `step`."""

    def reset(self, *, seed: int) -> str:
        return "a"


def refuses_its_settings(*, known: int = 0) -> Echo:
    return Echo(num_turns=known)
