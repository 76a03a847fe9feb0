"""Compare scores over HTTP with a bare batched forward pass of the same model and with a naive server.

The three alternate in one run: the bare forward pass in this process, the service with enough clients to saturate it,
the naive server with the same clients. The service has one replica of one thread, like the bare pass; its HTTP actor is
a separate process.
"""

from __future__ import annotations

import asyncio
import random
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import ray
import torch
from ray import serve

from benchmarks.parts.character_model import CHARACTERS, make_reward_model
from benchmarks.results import Row
from cluster.scoring import ScoreRequest
from reward_service.client.handle import HandleRewardClient
from reward_service.config.service import RewardServiceConfig
from reward_service.scorers.reward_model import RewardModelScorer
from reward_service.serving.application import service_url, start_reward_service, stop_reward_service

BATCH, LENGTH, NUM_CLIENTS, REPEATS, ROUND_S = 64, 96, 4, 5, 8.0
Ask = Callable[[], Awaitable[None]]


def measure(folder: Path) -> list[Row]:
    """Measure rates, their ratios, latencies at half load, and the added cost of each HTTP contract."""
    torch.set_num_threads(1)
    sizes = {"hidden_size": 160, "intermediate_size": 448, "num_layers": 4, "num_heads": 5, "max_tokens": 256}
    model = make_reward_model(folder / "reward_model", **sizes)  # 1.3 M parameters
    ray.init("local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    config = RewardServiceConfig(port=_free_port(), max_batch_size=BATCH)
    try:
        start_reward_service(config, name="bench", reward_model_path=model, token=None)
        with _naive_server(model) as naive_url:
            return asyncio.run(_measure(RewardModelScorer(model), service_url(config), naive_url))
    finally:
        stop_reward_service("bench")
        serve.shutdown()
        ray.shutdown()


async def _measure(scorer: RewardModelScorer, url: str, naive_url: str) -> list[Row]:
    items = _items(BATCH)
    ours, naive, bare = [], [], []
    async with httpx.AsyncClient(timeout=60, trust_env=False) as http:
        rewards = _posting(http, f"{url}/v1/rewards", _own_body(items))
        blocking = _posting(http, f"{naive_url}/get_reward", _openrlhf_body(items))
        for _ in range(REPEATS + 1):
            bare.append(_bare_rate(scorer, items))
            ours.append(await _rate(rewards))
            naive.append(await _rate(blocking))
        half = statistics.median(ours[1:]) / BATCH / 2
        latencies = [await _latencies(ask, half) for ask in (rewards, blocking)]
        costs = await _contract_costs(http, url, items)
    return [
        Row("scores/s over HTTP, batch 64, over a bare forward's", _ratios(ours, bare), "", ">= 0.8"),
        Row("bare batched forward", tuple(bare[1:]), "scores/s"),
        Row("over HTTP", tuple(ours[1:]), "scores/s"),
        Row("naive server", tuple(naive[1:]), "scores/s"),
        Row("over HTTP over the naive server", _ratios(ours, naive), "x"),
        *(
            Row(f"{who}: {name} of a request of 64 at half load", (value,), "ms")
            for who, given in zip(("ours", "naive server"), latencies, strict=True)
            for name, value in (("p50", _quantile(given, 0.5)), ("p99", _quantile(given, 0.99)))
        ),
        *costs,
    ]


def _ratios(a: list[float], b: list[float]) -> tuple[float, ...]:
    return tuple(x / y for x, y in zip(a[1:], b[1:], strict=True))


def _bare_rate(scorer: RewardModelScorer, items: list[ScoreRequest]) -> float:
    started, num_scored = time.monotonic(), 0
    while time.monotonic() - started < ROUND_S / 2:
        num_scored += len(scorer.score_batch(items))
    return num_scored / (time.monotonic() - started)


async def _rate(ask: Ask) -> float:
    """Return scores/s with `NUM_CLIENTS` concurrent requests."""
    started, num_asked = time.monotonic(), 0

    async def client() -> None:
        nonlocal num_asked
        while time.monotonic() - started < ROUND_S:
            await ask()
            num_asked += 1

    await asyncio.gather(*(client() for _ in range(NUM_CLIENTS)))
    return num_asked * BATCH / (time.monotonic() - started)


async def _latencies(ask: Ask, per_s: float) -> list[float]:
    """Return the milliseconds of requests that arrive at random, `per_s` a second, regardless of those in flight."""
    arrivals, under_way, spent = random.Random(0), [], []

    async def timed() -> None:
        started = time.monotonic()
        await ask()
        spent.append(1000 * (time.monotonic() - started))

    started = time.monotonic()
    while time.monotonic() - started < 3 * ROUND_S:
        under_way.append(asyncio.create_task(timed()))
        await asyncio.sleep(arrivals.expovariate(per_s))
    await asyncio.gather(*under_way)
    return spent


async def _contract_costs(http: httpx.AsyncClient, url: str, items: list[ScoreRequest]) -> list[Row]:
    """Measure the milliseconds per score that each contract adds to a call by handle, one call at a time."""
    handle = HandleRewardClient("bench", 60)
    texts = [item.prompt + item.response for item in items]
    contracts: dict[str, Ask] = {
        "POST /v1/rewards": _posting(http, f"{url}/v1/rewards", _own_body(items)),
        "POST /get_reward": _posting(http, f"{url}/get_reward", _openrlhf_body(items)),
        "POST /classify": _posting(http, f"{url}/classify", {"input": texts, "use_activation": False}),
    }
    spent: dict[str, list[float]] = {name: [] for name in ("handle", *contracts)}
    for _ in range(30):
        for name, ask in (("handle", lambda: handle.outcomes(items)), *contracts.items()):
            started = time.monotonic()
            await ask()
            spent[name].append(1000 * (time.monotonic() - started) / BATCH)
    by_handle = statistics.median(spent.pop("handle"))
    return [
        Row(f"{name}: added to a call by handle, a score", (statistics.median(times) - by_handle,), "ms")
        for name, times in spent.items()
    ]


def _posting(http: httpx.AsyncClient, url: str, body: dict[str, Any]) -> Ask:
    async def ask() -> None:
        (await http.post(url, json=body)).raise_for_status()

    return ask


def _own_body(items: list[ScoreRequest]) -> dict[str, Any]:
    return {"prompts": [item.prompt for item in items], "responses": [item.response for item in items]}


def _openrlhf_body(items: list[ScoreRequest]) -> dict[str, Any]:
    return {"query": [item.prompt + item.response for item in items], "prompts": [item.prompt for item in items]}


def _items(num: int) -> list[ScoreRequest]:
    letters = random.Random(0)
    text = ["".join(letters.choices(CHARACTERS, k=LENGTH)) for _ in range(num)]
    return [ScoreRequest(str(i), "say ", response) for i, response in enumerate(text)]


@contextmanager
def _naive_server(model: Path) -> Iterator[str]:
    port = _free_port()
    process = subprocess.Popen([sys.executable, "-m", "benchmarks.parts.naive_reward_server", str(model), str(port)])
    try:
        for _ in range(600):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            if process.poll() is not None:
                raise RuntimeError(f"the naive server exited with status {process.returncode} before it listened")
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def _quantile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
