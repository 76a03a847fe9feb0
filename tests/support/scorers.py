"""Scorer functions that tests name by dotted path: correct ones, and one for each kind of error."""

from __future__ import annotations

import asyncio
import os
import random
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any


def length(prompts: list[str], responses: list[str], **columns: Any) -> list[float]:
    return [float(len(response)) for response in responses]


async def length_async(prompts: list[str], responses: list[str], **columns: Any) -> list[float]:
    await asyncio.sleep(0)
    return length(prompts, responses)


def equals_reference(prompts: list[str], responses: list[str], references: list[str]) -> list[float]:
    return [float(response == reference) for response, reference in zip(responses, references, strict=True)]


def slow(prompts: list[str], responses: list[str]) -> list[float]:
    time.sleep(20)
    return length(prompts, responses)


def die_once(prompts: list[str], responses: list[str], references: list[str]) -> list[float]:
    """Kill the process, unless the file in `references` exists; creates it first."""
    mark = Path(references[0])
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return length(prompts, responses)


def gated(prompts: list[str], responses: list[str], references: list[list[str]]) -> list[float]:
    """Create the first file in `references`, then wait for the second."""
    started, release = map(Path, references[0])
    started.touch()
    while not release.exists():
        time.sleep(0.01)
    return length(prompts, responses)


def raising(prompts: list[str], responses: list[str]) -> list[float]:
    raise KeyError("no such answer")


def raising_on_text(prompts: list[str], responses: list[str]) -> list[float]:
    if any(responses):
        raise KeyError("no such answer")
    return [0.0 for _ in responses]


def too_few(prompts: list[str], responses: list[str]) -> list[float]:
    return [1.0] * (len(responses) - 1)


def not_a_list(prompts: list[str], responses: list[str]) -> Any:
    return 1.0


def wrong_on_demand(prompts: list[str], responses: list[str]) -> list[Any]:
    """Return the kind of value that each response names."""
    values = {"nan": float("nan"), "inf": float("inf"), "huge": 10**400, "string": "0.5", "none": None, "one": 1}
    return [values[response] for response in responses]


def needs_main_thread(prompts: list[str], responses: list[str]) -> list[float]:
    """Set an alarm, as time limits of libraries do, and run an event loop."""
    signal.signal(signal.SIGALRM, signal.SIG_IGN)
    signal.alarm(60)
    asyncio.run(asyncio.sleep(0))
    signal.alarm(0)
    return length(prompts, responses)


def math_verified(completions: list[str], solution: list[str], **kwargs: Any) -> list[float]:
    from math_verify import parse, verify

    return [float(verify(parse(gold), parse(text))) for text, gold in zip(completions, solution, strict=True)]


def hangs_on_demand(prompts: list[str], responses: list[str]) -> list[float]:
    while "hang" in responses:
        time.sleep(1)
    return length(prompts, responses)


async def waits_on_demand(prompts: list[str], responses: list[str]) -> list[float]:
    if "hang" in responses:
        await asyncio.Event().wait()
    return length(prompts, responses)


def exits(prompts: list[str], responses: list[str]) -> list[float]:
    os._exit(7)


def starts_a_process(prompts: list[str], responses: list[str]) -> list[float]:
    """Start a process that goes on, and write its id to the file that the first response names."""
    started = subprocess.Popen(["sleep", "600"])
    Path(responses[0]).write_text(str(started.pid))
    return length(prompts, responses)


text = "not a function"


def take_one(observation: str, choice: random.Random) -> str:
    """Take one object from a pile of Nim that has some; the piles stand at the end of the observation."""
    piles = re.findall(r"pile (\d+): (\d+)", observation)[-3:]
    return f"[{choice.choice([pile for pile, num in piles if int(num)])} 1]"
