"""Measure the overlap of sampling and learning: the longer of the two over the time of a step.

Both are stand-ins that only wait; queue, rollout actor and training loop are real, in one process. Nothing competes for
the processor, so every loss is due to coordination.
"""

from __future__ import annotations

import asyncio
import time

from benchmarks.results import Row
from benchmarks.scale.stand_ins import DropsRecords, OneToAll, Pace, StandInActor, StandInLearners, manifest
from cluster.config import TrajectoryQueueConfig
from cluster.data.prompt_order import TaskPrompts
from cluster.queue.trajectory_queue import TrajectoryQueue
from cluster.weights.store import WeightStore
from deploy.ring.calls import RingCalls
from learner.training_loop import Groups, StepResult, train
from rollout_actors.config import RolloutActorsConfig

GROUPS_PER_STEP, RESPONSE_TOKENS, NUM_STEPS = 32, 16, 30
TOKEN_S, LEARN_S = 0.02, 0.32


async def measure() -> list[Row]:
    """Measure the longer phase over the step time, after the first steps."""
    queue = TrajectoryQueue(
        TrajectoryQueueConfig(groups_per_step=GROUPS_PER_STEP, max_policy_lag=1),
        [TaskPrompts("stand-in", [{"prompt": "bcd:"}])],
        run_seed=0,
        num_steps=NUM_STEPS,
    )
    store, ends = WeightStore(), []
    config = RolloutActorsConfig(
        responses_per_prompt=1,
        max_prompt_tokens=9,
        max_response_tokens=RESPONSE_TOKENS,
        num_concurrent_groups=GROUPS_PER_STEP,
    )
    actor = StandInActor("rollout-0", config, Pace(step_s=TOKEN_S))
    await actor.start()

    async def report(step: int, groups: Groups, result: StepResult) -> None:
        ends.append(time.monotonic())

    learners = StandInLearners(LEARN_S)
    calls = RingCalls(queue=queue, learners=learners, store=store, recorder=DropsRecords())
    await calls.publish(manifest(0))
    running = asyncio.ensure_future(actor.run(queue, store, OneToAll()))
    await train(
        first_step=1,
        num_steps=NUM_STEPS,
        learners=calls,
        queue=calls,
        weights=calls,
        report=report,
    )
    await actor.close()
    await running
    step_s = (ends[-1] - ends[4]) / (len(ends) - 5)
    longer_s = max(TOKEN_S * RESPONSE_TOKENS, LEARN_S)
    return [Row("overlap with latency stand-ins: longer phase / step time", (longer_s / step_s,), "", ">= 0.9")]
