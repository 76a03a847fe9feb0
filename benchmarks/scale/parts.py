"""Measure the shared parts of a ring alone, at full load.

These are the queue without a recorder, the recorder without a queue, and the fan-out of a version to many actors.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.results import Row
from benchmarks.scale.ring import ROWS
from benchmarks.scale.stand_ins import manifest
from cluster.actors.remote import RemoteActor, kill_actor, start_actor
from cluster.config import TrajectoryQueueConfig
from cluster.data.prompt_order import TaskPrompts
from cluster.journal import events
from cluster.journal.recorder import Recorder
from cluster.queue.trajectory_queue import TrajectoryQueue
from cluster.trajectory import FinishedGroup, Segment, Ticket, Trajectory, Turn, segment_seed
from cluster.weights.manifest import Manifest
from cluster.weights.object_store import fetch_tensors, put_tensors
from cluster.weights.store import WeightStore

NUM_CLIENTS, WAVE = 8, 16
NUM_QUEUE_STEPS, GROUPS_PER_STEP = 16, 256
NUM_WAVES = 16
RESPONSE_TOKENS = (64, 1024)
PROMPT_TOKENS, VOCABULARY = 16, 32_000
WEIGHTS_MIB, FETCHERS_A_PROCESS, REPEATS = 16, 64, 3
TIMEOUT_S = 300.0


async def measure(folder: Path, max_actors: int) -> list[Row]:
    """Measure the throughput of queue and recorder, and the fan-out to 1, 4, 16, ... `max_actors` actors."""
    rows = []
    for num_tokens in RESPONSE_TOKENS:
        rate = await _queue_groups_per_s(num_tokens)
        rows.append(Row(f"queue alone, {num_tokens:,} tokens: groups of one", (rate,), "/s"))
        rows += await _recorder(folder / f"records-{num_tokens}", num_tokens)
    num = 1
    while num <= max_actors:
        rows += await _fan_out(num)
        num *= 4
    return rows


def finished_group(ticket: Ticket, num_tokens: int) -> FinishedGroup:
    """Return a group with one response of `num_tokens`, as a rollout actor puts it."""
    uid = ticket.uid(0)
    draw = random.Random(uid)
    trajectory = Trajectory(
        uid=uid,
        group=ticket.group,
        task="scale",
        token_ids=[draw.randrange(VOCABULARY) for _ in range(PROMPT_TOKENS + num_tokens)],
        mask=[False] * PROMPT_TOKENS + [True] * num_tokens,
        behavior_logprobs=[0.0] * PROMPT_TOKENS + [-draw.random() for _ in range(num_tokens)],
        segments=[Segment(0, PROMPT_TOKENS, num_tokens, segment_seed(uid, 0), ticket.owner)],
        turns=[Turn(PROMPT_TOKENS, num_tokens)],
        admission_index=ticket.admission_index,
        finish_reason="length",
        reward=1.0,
        scorer_version="one",
    )
    return ticket, [trajectory]


async def _queue_groups_per_s(num_tokens: int) -> float:
    """Let `NUM_CLIENTS` admit and put waves at full speed, and take each step as soon as it is complete."""
    config = TrajectoryQueueConfig(groups_per_step=GROUPS_PER_STEP, max_policy_lag=NUM_QUEUE_STEPS)
    prompts = [TaskPrompts("scale", ROWS)]
    queue = start_actor(TrajectoryQueue, config, prompts, run_seed=0, num_steps=NUM_QUEUE_STEPS, name="queue")
    await queue.published(0)

    async def client(number: int) -> None:
        while tickets := await queue.admit(f"client-{number}", max_groups=WAVE, timeout_s=1.0):
            await queue.put([finished_group(ticket, num_tokens) for ticket in tickets])

    clients = [asyncio.create_task(client(number)) for number in range(NUM_CLIENTS)]
    await queue.take(1)
    started = time.monotonic()
    for step in range(2, NUM_QUEUE_STEPS + 1):
        await queue.take(step)
    rate = (NUM_QUEUE_STEPS - 1) * GROUPS_PER_STEP / (time.monotonic() - started)
    await asyncio.gather(*clients)
    kill_actor(queue)
    return rate


async def _recorder(folder: Path, num_tokens: int) -> list[Row]:
    """Let `NUM_CLIENTS` record waves of trajectories as fast as the disk takes them."""
    recorder = start_actor(Recorder, folder, name="recorder")
    num_groups = NUM_CLIENTS * NUM_WAVES * WAVE
    tickets = [Ticket(i, i, 0, 0, ROWS[i % len(ROWS)], "client") for i in range(num_groups)]
    await recorder.begin("scale", version=0, group=0, num_steps=0)
    await recorder.record([events.admit(ticket) for ticket in tickets])
    waves = [_wave(tickets[i : i + WAVE], num_tokens) for i in range(0, num_groups, WAVE)]

    async def client(number: int) -> None:
        for wave in waves[number::NUM_CLIENTS]:
            await recorder.record(wave)

    before, started = _size_bytes(folder), time.monotonic()
    await asyncio.gather(*(client(number) for number in range(NUM_CLIENTS)))
    wall_s, size_bytes = time.monotonic() - started, _size_bytes(folder) - before
    await recorder.close()
    closed_bytes = _size_bytes(folder)
    kill_actor(recorder)
    name, num_records = f"recorder alone, {num_tokens:,} tokens", sum(map(len, waves))
    return [
        Row(f"{name}: trajectories", (num_groups / wall_s,), "/s"),
        Row(f"{name}: records", (num_records / wall_s,), "/s"),
        Row(f"{name}: written", (size_bytes / wall_s / 1e6,), "MB/s"),
        Row(f"{name}: bytes a token as written", (size_bytes / num_groups / num_tokens,)),
        Row(f"{name}: bytes a token once closed", (closed_bytes / num_groups / num_tokens,)),
    ]


def _wave(tickets: Sequence[Ticket], num_tokens: int) -> list[events.Record]:
    groups = [finished_group(ticket, num_tokens) for ticket in tickets]
    return [record for _, trajectories in groups for t in trajectories for record in events.finished(t)]


def _size_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("records-*"))


class Fetchers:
    """Fetches every version for many actors in one process."""

    async def fetch(self, store: RemoteActor, num: int, version: int) -> tuple[float, float]:
        """Return the monotonic times when the last of `num` was notified of the next version and had its tensors."""
        ends = await asyncio.gather(*(self._fetch_one(store, version) for _ in range(num)))
        return max(heard for heard, _ in ends), max(fetched for _, fetched in ends)

    async def _fetch_one(self, store: RemoteActor, version: int) -> tuple[float, float]:
        published = await store.wait_other(("stand-in", version), timeout_s=TIMEOUT_S)
        heard = time.monotonic()
        await asyncio.to_thread(fetch_tensors, published, timeout_s=TIMEOUT_S)
        return heard, time.monotonic()

    async def ping(self) -> None:
        """Return if the process runs."""


async def _fan_out(num: int) -> list[Row]:
    """Measure the time from publication of WEIGHTS_MIB until all of `num` actors are notified, and have the tensors.

    The first version, during which the processes import modules, is not counted.
    """
    store = start_actor(WeightStore, name="weight_store")
    await store.publish(manifest(0))
    shares = [min(FETCHERS_A_PROCESS, num - first) for first in range(0, num, FETCHERS_A_PROCESS)]
    processes = [start_actor(Fetchers, name=f"fetchers-{i}") for i in range(len(shares))]
    await asyncio.gather(*(process.ping() for process in processes))
    heard_s, fetched_s = [], []
    for version in range(1, REPEATS + 2):
        published = _weights(version)
        fetching = [
            asyncio.ensure_future(process.fetch(store, share, version - 1))
            for process, share in zip(processes, shares, strict=True)
        ]
        await asyncio.gather(*(process.ping() for process in processes))
        started = time.monotonic()
        await store.publish(published)
        ends = await asyncio.gather(*fetching)
        if version > 1:
            heard_s.append(max(heard for heard, _ in ends) - started)
            fetched_s.append(max(fetched for _, fetched in ends) - started)
    for part in (store, *processes):
        kill_actor(part)
    name = f"{num} actors fetch {WEIGHTS_MIB} MiB"
    return [
        Row(f"{name}: all have heard of it", tuple(1000 * s for s in heard_s), "ms"),
        Row(f"{name}: all have it", tuple(fetched_s), "s"),
        Row(f"{name}: together", tuple(num * WEIGHTS_MIB / s for s in fetched_s), "MiB/s"),
    ]


def _weights(version: int) -> Manifest:
    tensors = put_tensors([("weight", torch.full((WEIGHTS_MIB, 2**18), float(version)))])
    plain = manifest(version)
    return Manifest(version, plain.incarnation, tensors, plain.probe_token_ids, plain.probe, plain.previous_probe)
