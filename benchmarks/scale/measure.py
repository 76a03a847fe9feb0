"""Measure rings of 1 to 256 stand-in rollout actors on one machine: throughput and processor time of each part.

Every actor offers the same rate, so a ring that keeps up trains as many groups a second as its actors offer. If it does
not, the processor time of its parts shows the bottleneck. `scale.parts` measures queue, recorder and weights without a
ring. Up to 64 actors are separate processes; 256 are objects in few processes, since a laptop has no room for as many.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import ray

from benchmarks.results import Row
from benchmarks.scale import parts
from benchmarks.scale.ring import Plan, stand_in_ring
from benchmarks.scale.stand_ins import Pace

PROCESSES, OBJECTS = (1, 4, 16, 64), (16, 64, 256)
NUM_HOSTS = 4
NUM_STEPS, NUM_SETTLING = 20, 5
STEP_S, TOKENS_A_STEP, RESPONSE_TOKENS, CONCURRENT = 0.25, 64, 256, 4
SAMPLING_S = STEP_S * RESPONSE_TOKENS / TOKENS_A_STEP
"""Seconds to sample a response; an actor offers CONCURRENT / SAMPLING_S responses a second."""
PARTS: dict[str, str | tuple[str, ...]] = {
    "queue": "ray::TrajectoryQueue",
    "recorder": "ray::Recorder",
    "weight store": "ray::WeightStore",
    "actors": ("ray::StandInActor", "ray::ActorHost"),
}


def measure(
    folder: Path, processes: Sequence[int] = PROCESSES, objects: Sequence[int] = OBJECTS, steps: int = NUM_STEPS
) -> list[Row]:
    """Measure every size of the ring, then its parts alone."""
    ray.init("local", num_cpus=8, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        rows = [row for num in processes for row in asyncio.run(_ring(folder, num, 1, steps))]
        for num in objects:
            rows += asyncio.run(_ring(folder, num, max(2, num // NUM_HOSTS), steps))
        return rows + asyncio.run(parts.measure(folder, max(objects, default=max(processes))))
    finally:
        ray.shutdown()


async def _ring(folder: Path, num: int, actors_a_process: int, steps: int) -> list[Row]:
    """Measure groups per second and processor time of a ring of `num` actors, after the first steps."""
    plan = Plan(
        num_actors=num,
        num_steps=steps,
        actors_a_process=actors_a_process,
        groups_per_step=max(8, num * CONCURRENT),
        num_concurrent_groups=CONCURRENT,
        max_response_tokens=RESPONSE_TOKENS,
        pace=Pace(step_s=STEP_S, tokens_a_step=TOKENS_A_STEP),
    )
    seen: dict[int, tuple[float, defaultdict[str, float]]] = {}

    async def look(step: int) -> None:
        if step in (NUM_SETTLING, steps):
            seen[step] = (time.monotonic(), _cpu_s())

    kind = "processes" if actors_a_process == 1 else "objects"
    async with stand_in_ring(plan, folder / f"{kind}-{num}") as ring:
        await ring.turn(look)
    (started, before), (ended, after) = seen[NUM_SETTLING], seen[steps]
    num_groups = (steps - NUM_SETTLING) * plan.groups_per_step
    cpu_s = {part: after[part] - before.get(part, 0.0) for part in after}
    return list(_rows(f"{num} {kind}", plan, num_groups, ended - started, cpu_s))


def _rows(name: str, plan: Plan, num_groups: int, wall_s: float, cpu_s: dict[str, float]) -> Iterator[Row]:
    rate = num_groups / wall_s
    slots = min(plan.num_actors * CONCURRENT, plan.groups_per_step * (plan.max_policy_lag + 1))
    yield Row(f"{name}: trained", (rate,), "groups/s")
    yield Row(f"{name}: offered", (slots / SAMPLING_S,), "groups/s")
    yield Row(f"{name}: coordination", (1000 * (slots / rate - SAMPLING_S),), "ms a trajectory")
    for part in (*PARTS, "driver", "Ray"):
        yield Row(f"{name}: {part}", (100 * cpu_s.get(part, 0.0) / wall_s,), "% of a core")


def _cpu_s() -> defaultdict[str, float]:
    """Return the processor seconds so far of every part of the ring and of Ray's processes."""
    seconds = defaultdict[str, float](float)
    driver = psutil.Process()
    for process in (driver, *driver.children(recursive=True)):
        try:
            name, times = process.name(), process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        part = next((part for part, prefix in PARTS.items() if name.startswith(prefix)), "Ray")
        seconds["driver" if process.pid == driver.pid else part] += times.user + times.system
    return seconds
