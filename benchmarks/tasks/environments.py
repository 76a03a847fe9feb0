"""What conversations cost: how many a second over a stand-in engine, what they add to a bare prompt, and, with a real
engine, what the turns before cost a turn that are prefilled again.

The engine's thread, the conversations, the tokenizer and its chat template are the real ones. In the first two a step
of the engine is 20 ms of waiting for 64 requests at once, as that of a small model on a GPU may be; what hides behind
that wait is measured by itself, in microseconds of CPU.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.results import Row
from benchmarks.scale.stand_ins import Pace, StandInEngine
from rollout_actors.config import EnvironmentConfig
from rollout_actors.conversations.conversation import Conversation, single_turn
from rollout_actors.conversations.dialogue import Dialogue
from rollout_actors.conversations.runner import Conversations
from rollout_actors.engine.response import ResponseRequest, SampledResponse
from rollout_actors.engine.thread import EngineThread
from rollout_actors.environments.host import InProcessHost, Threads
from rollout_actors.prompts import PromptTokenizer

STEP_S, NUM_AT_ONCE, NUM_TURNS, RESPONSE_TOKENS = 0.02, 64, 3, 16
REPEATS, NUM_SINGLE, SINGLE_TOKENS, NUM_BARE = 3, 256, 64, 2000
WORDS = tuple(f"w{number}" for number in range(200))
PROMPT = " ".join(WORDS[:12])
LONG, CACHE_CONVERSATIONS, CACHE_RESPONSE = 250, 8, 8
HERE = "benchmarks.tasks.environments"


class Talk:
    """Says so many words after each of so many answers."""

    def __init__(self, *, num_turns: int, num_words: int = 12, in_messages: bool = True) -> None:
        self._num_turns = num_turns
        self._text = " ".join(WORDS[place % len(WORDS)] for place in range(num_words))
        self._in_messages = in_messages
        self._num_heard = 0

    def reset(self, *, seed: int) -> Any:
        """Begin; the seed makes the beginning another one, so that no two conversations share their first tokens."""
        self._num_heard = 0
        text = f"{WORDS[seed % len(WORDS)]} {WORDS[seed // len(WORDS)]} {self._text}"
        return [{"role": "user", "content": text}] if self._in_messages else text

    def step(self, response: str) -> tuple[str, float, bool, bool, dict[str, float]]:
        """Answer, or end."""
        self._num_heard += 1
        return self._text, 1.0, self._num_heard == self._num_turns, False, {}


def measure(folder: Path) -> list[Row]:
    """All figures."""
    from examples.tiny_model import write_tiny_model

    write_tiny_model(folder / "model", WORDS, seed=0, max_positions=1024)
    tokenizer = PromptTokenizer(str(folder / "model"), max_prompt_tokens=512)
    rows = asyncio.run(_many(tokenizer)) + asyncio.run(_ratio(tokenizer)) + asyncio.run(_bare(tokenizer))
    return rows + asyncio.run(_prefix_cache(tokenizer, folder / "model"))


async def _engine(max_tokens: int) -> EngineThread:
    build = partial(StandInEngine, Pace(step_s=STEP_S), max_tokens, NUM_AT_ONCE)
    engine = EngineThread(build, name="stand-in", dtype="float32")
    await engine.start()
    return engine


def _settings(num_turns: int, **settings: Any) -> EnvironmentConfig:
    path, made_with = f"{HERE}:Talk", {"num_turns": num_turns, **settings}
    return EnvironmentConfig(path=path, settings=made_with, max_turns=num_turns, max_tokens=1000)


async def _hold(conversations: Conversations, number: int) -> Conversation:
    return await conversations.run(f"0-{number}-0", {}, seed=number, temperature=1.0, min_policy_version=-1)


async def _many(tokenizer: PromptTokenizer) -> list[Row]:
    """Conversations a second, so many at once."""
    rows, engine = [], await _engine(RESPONSE_TOKENS)
    config = _settings(NUM_TURNS)
    for num in (1, 64, 512):
        conversations = Conversations(config, tokenizer, engine, max_response_tokens=RESPONSE_TOKENS)
        rates = []
        for _ in range(REPEATS if num < 512 else 2):
            started = time.monotonic()
            await asyncio.gather(*(_hold(conversations, number) for number in range(num)))
            rates.append(num / (time.monotonic() - started))
        await conversations.close()
        most = min(num, NUM_AT_ONCE) / (NUM_TURNS * RESPONSE_TOKENS * STEP_S)
        rows.append(Row(f"{NUM_TURNS}-turn conversations/s, {num} at once", tuple(rates), "/s"))
        rows.append(
            Row(f"of what the engine's waits allow, {num} at once", tuple(rate / most for rate in rates), "", ">= 0.9")
        )
    await engine.close()
    return rows


async def _ratio(tokenizer: PromptTokenizer) -> list[Row]:
    """The same number of responses through the plain path and through environments of one turn, in turn."""
    engine = await _engine(SINGLE_TOKENS)
    conversations = Conversations(_settings(1), tokenizer, engine, max_response_tokens=SINGLE_TOKENS)

    def sample(token_ids: Sequence[int], *, max_tokens: int) -> Awaitable[SampledResponse]:
        return engine.sample(ResponseRequest(f"p-{next(numbers)}", token_ids, max_tokens, 1.0))

    numbers = itertools.count()
    ratios = []
    for _ in range(REPEATS):
        plain_s = await _timed(lambda number: _plain(tokenizer, sample, number))
        ratios.append(await _timed(lambda number: _hold(conversations, number)) / plain_s - 1)
    await conversations.close()
    await engine.close()
    return [Row("one-turn environments over bare prompts: time more", tuple(ratios), "", "<= 0.03")]


async def _timed(one: Callable[[int], Awaitable[Any]]) -> float:
    started = time.monotonic()
    await asyncio.gather(*(one(number) for number in range(NUM_SINGLE)))
    return time.monotonic() - started


async def _plain(tokenizer: PromptTokenizer, sample: Any, number: int) -> Conversation:
    """What a rollout actor does with a prompt whose chat template was written before."""
    (token_ids,) = tokenizer.encode([f"{WORDS[number % len(WORDS)]} {PROMPT}"])
    response = await sample(token_ids, max_tokens=SINGLE_TOKENS)
    tokenizer.decode([response.token_ids])
    return single_turn(PROMPT, token_ids, response)


async def _bare(tokenizer: PromptTokenizer) -> list[Row]:
    """CPU of a turn with an engine that answers at once, all threads together."""
    answer = SampledResponse("u", list(range(10, 26)), [-1.0] * 16, [], "stop")

    async def sample(token_ids: Sequence[int], *, max_tokens: int, first_segment: int = 0) -> SampledResponse:
        return answer

    async def hold(number: int, **settings: Any) -> None:
        environment = Talk(num_turns=10, **settings)
        host = InProcessHost(environment, threads, timeout_s=30.0)
        dialogue = Dialogue(host, tokenizer, _settings(10), max_response_tokens=16)
        await dialogue.run("u", seed=number, columns={}, sample=sample)

    threads, rows = Threads(), []
    for name, settings in (("messages", {}), ("plain text", {"in_messages": False})):
        spent = await _cpu_us(NUM_BARE // 10, partial(hold, **settings))
        rows.append(Row(f"CPU of a turn in {name}, nine in ten of them later ones", (spent / 10,), "us"))
    spent = await _cpu_us(NUM_BARE, lambda number: _plain(tokenizer, sample, number))
    threads.close()
    return [*rows, Row("CPU of a bare prompt, tokens to text", (spent,), "us")]


async def _cpu_us(num: int, one: Callable[[int], Awaitable[Any]]) -> float:
    await one(0)
    started = time.process_time()
    for number in range(num):
        await one(number)
    return 1e6 * (time.process_time() - started) / num


async def _prefix_cache(tokenizer: PromptTokenizer, model: Path) -> list[Row]:
    """vLLM's time for conversations of some 800 tokens; earlier turns are prefilled again or found in its cache."""
    engines = {name: await _vllm(model, enable_prefix_caching=name == "with") for name in ("with", "without")}
    config = _settings(NUM_TURNS, num_words=LONG)
    times: dict[str, list[float]] = {name: [] for name in engines}
    for repeat in range(REPEATS + 1):
        for name, engine in engines.items():
            conversations = Conversations(config, tokenizer, engine, max_response_tokens=CACHE_RESPONSE)
            started = time.monotonic()
            numbers = range(repeat * CACHE_CONVERSATIONS, (repeat + 1) * CACHE_CONVERSATIONS)
            await asyncio.gather(*(_hold(conversations, number) for number in numbers))
            times[name].append(time.monotonic() - started)
            await conversations.close()
    for engine in engines.values():
        await engine.close()
    measured = {name: values[1:] for name, values in times.items()}
    rows = [
        Row(f"{NUM_TURNS} turns of {LONG} tokens, {name} prefix cache", tuple(values), "s")
        for name, values in measured.items()
    ]
    ratios = tuple(b / a for a, b in zip(measured["with"], measured["without"], strict=True))
    return [*rows, Row("multi-turn engine time without prefix cache over with it", ratios, "x")]


async def _vllm(model: Path, **engine_args: Any) -> EngineThread:
    from rollout_actors.engine.vllm_engine import VllmEngine

    sizes = {"max_num_seqs": CACHE_CONVERSATIONS, **engine_args}
    build = partial(VllmEngine, str(model), engine_args=sizes, max_model_len=1001, seed=0, dtype="float32")
    engine = EngineThread(build, name="vllm", dtype="float32")
    await engine.start()
    return engine
