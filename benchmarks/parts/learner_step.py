"""Compare the learner group's step with a bare torch loop on the same batch, alternating (A B A B).

Both are Ray actors of one thread. The loop is timed in its own process; the learner group is timed by its caller, so
its figure includes the transport of the batch and the publication of the weights.
"""

from __future__ import annotations

import random
from pathlib import Path

from benchmarks.parts.bare_loop import BareLoop
from benchmarks.results import Row
from benchmarks.tasks.letters import letters_config
from cluster.actors.remote import kill_actor, start_actor
from cluster.trajectory import Segment, Trajectory, Turn
from learner.place import Place
from learner.ppo.group import PPOLearnerGroup
from learner.ppo.rank import LearnerSettings

NUM_WARM, NUM_STEPS = 3, 20
PROMPT_TOKENS, RESPONSE_TOKENS, NUM_LETTERS = 9, 16, 42


def batch(step: int, num: int) -> list[Trajectory]:
    """Return `num` trajectories of the letters' lengths from version `step` - 1, with random tokens and rewards."""
    draw = random.Random(step)
    length = PROMPT_TOKENS + RESPONSE_TOKENS
    return [
        Trajectory(
            uid=f"{step}/{index}",
            group=index,
            task="bench",
            token_ids=[draw.randrange(NUM_LETTERS) for _ in range(length)],
            mask=[False] * PROMPT_TOKENS + [True] * RESPONSE_TOKENS,
            behavior_logprobs=[0.0] * PROMPT_TOKENS + [-3.8] * RESPONSE_TOKENS,
            segments=[Segment(step - 1, PROMPT_TOKENS, RESPONSE_TOKENS, 0, "bench")],
            turns=[Turn(PROMPT_TOKENS, RESPONSE_TOKENS)],
            admission_index=index,
            finish_reason="length",
            reward=draw.random(),
        )
        for index in range(num)
    ]


async def measure(model: Path) -> list[Row]:
    """Measure the ratio of every pair of steps after the warm-up, and the seconds of both."""
    settings = letters_config(num_steps=NUM_STEPS, max_policy_lag=0)
    bare = start_actor(BareLoop, str(model), settings.learner, name="bare")
    group = await PPOLearnerGroup.start(LearnerSettings(settings.learner, Place(model)))
    ours, theirs = [], []
    try:
        for step in range(1, NUM_WARM + NUM_STEPS + 1):
            trajectories = batch(step, settings.trajectory_queue.groups_per_step)
            ours.append(
                (await group.step(step, [[trajectory] for trajectory in trajectories])).metrics["learner/step_s"]
            )
            theirs.append(await bare.step_s(trajectories))
    finally:
        await group.shutdown()
        kill_actor(bare)
    ours, theirs = ours[NUM_WARM:], theirs[NUM_WARM:]
    ratios = tuple(a / b for a, b in zip(ours, theirs, strict=True))
    return [
        Row("learner step over a bare torch loop", ratios, "", "<= 1.05"),
        Row("learner step, letters, transport and publication included", tuple(ours), "s"),
        Row("bare torch loop, letters", tuple(theirs), "s"),
    ]
