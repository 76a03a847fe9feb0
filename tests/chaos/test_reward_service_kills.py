"""Replicas killed under load: nothing that was asked is lost, and no answer is wrong."""

from __future__ import annotations

import asyncio
import math
import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray import serve
from ray.exceptions import RayError

from cluster.scoring import ScoreRequest
from reward_service.client.http import HttpRewardClient
from reward_service.config.service import RewardServiceConfig
from reward_service.scorers.reward_model import RewardModelScorer
from reward_service.serving.application import service_url, start_reward_service, stop_reward_service
from tests.support.building import replica_pids, scores_of

pytestmark = [pytest.mark.ray, pytest.mark.chaos, pytest.mark.timeout(1200)]
NUM_CLIENTS, NUM_KILLS = 200, 10
ITEMS = [ScoreRequest(f"7-{i}-0", "say ", "abc" * (1 + i % 9) + "z" * (i % 7)) for i in range(64)]


@pytest.fixture
def url(ray_session: None, reward_model_folder: Path) -> Iterator[str]:
    serve.shutdown()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    config = RewardServiceConfig(port=port, num_cpus=0.1, num_replicas=2, timeout_s=120.0)
    start_reward_service(config, name="killed", reward_model_path=reward_model_folder, token=None)
    yield service_url(config)
    stop_reward_service("killed")


async def _both_pids(known: set[int]) -> list[int]:
    """The processes of both replicas, once none of them is among those that were killed."""
    for _ in range(1200):
        try:
            pids = await asyncio.to_thread(replica_pids, "killed")
        except (RayError, TimeoutError):
            pids = []
        if len(pids) == 2 and not known & set(pids):
            return pids
        await asyncio.sleep(0.1)
    raise AssertionError("the second replica did not come back")


async def test_200_clients_get_correct_rewards_while_replicas_are_killed(url: str, reward_model_folder: Path) -> None:
    expected = {score.id: score.reward for score in RewardModelScorer(reward_model_folder).score_batch(ITEMS)}  # type: ignore[union-attr]
    done, seconds, worst = asyncio.Event(), [], 0.0
    client = HttpRewardClient(url, None, 120.0)

    async def ask(number: int) -> None:
        nonlocal worst
        while not done.is_set():
            items = [ITEMS[(number + i) % len(ITEMS)] for i in range(4)]
            started = time.monotonic()
            for score in await scores_of(client, items):
                worst = max(worst, abs(score.reward - expected[score.id]))
            seconds.append(time.monotonic() - started)

    clients = [asyncio.create_task(ask(number)) for number in range(NUM_CLIENTS)]
    killed: set[int] = set()
    for kill in range(NUM_KILLS):
        pids = await _both_pids(killed)
        os.kill(pids[kill % 2], signal.SIGKILL)
        killed.add(pids[kill % 2])
    await _both_pids(killed)
    done.set()
    await asyncio.gather(*clients)
    await client.aclose()
    seconds.sort()
    p50, p99 = (seconds[math.floor(share * len(seconds))] for share in (0.5, 0.99))
    print(f"{len(seconds)} requests, {NUM_KILLS} kills, p50 {p50:.3f} s, p99 {p99:.3f} s, longest {seconds[-1]:.1f} s")
    print(f"largest difference from the offline score {worst:.2g}")
    assert len(killed) == NUM_KILLS
    assert worst <= 1e-6
