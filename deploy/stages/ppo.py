"""Run the PPO stage."""

from __future__ import annotations

import asyncio
import time
import uuid

from cluster.actors.control import RunControl, control_name
from cluster.actors.remote import RemoteActor, start_actor
from cluster.journal.recorder import Recorder
from cluster.queue.trajectory_queue import TrajectoryQueue
from cluster.weights.store import WeightStore
from deploy.data.prompts import task_prompts
from deploy.ring.learners import start_learners
from deploy.ring.resuming import Resumption, resumption
from deploy.ring.ring import Ring
from deploy.run.artifacts import policy_path
from deploy.run.layout import RECORDS
from deploy.runtime.session import Session
from learner.ppo.group import PPOLearnerGroup


async def run_ppo(session: Session) -> None:
    """Train the policy; ends with `policy/`. Goes on from the newest checkpoint if there is one."""
    started = time.monotonic()
    session.view.stage("ppo", session.config.learner.num_steps)
    ring = await _close_ring(session, started)
    try:
        await ring.turn()
        await ring.learners.save_policy(session.run.path / "policy")
        await ring.recorder.close()
    finally:
        await ring.learners.shutdown()


async def _close_ring(session: Session, started: float) -> Ring:
    config = session.config
    control = start_actor(
        RunControl,
        config.rollout_actors.num_actors,
        name="run_control",
        registered_as=control_name(config.run.name),
        log_path=session.log_path("run_control"),
    )
    recorder = start_actor(
        Recorder,
        session.run.path / RECORDS,
        name="recorder",
        log_path=session.log_path("recorder"),
        pinned_and_restarted=True,
    )
    store = start_actor(WeightStore, name="weight_store", log_path=session.log_path("weight_store"))
    queue, resumed, learners = await _start_parts(session, recorder)
    return Ring(session, control, queue, store, recorder, learners, resumed, started)


async def _start_parts(session: Session, recorder: RemoteActor) -> tuple[RemoteActor, Resumption, PPOLearnerGroup]:
    """Engines, reward service, queue and learner group start side by side; one that fails ends the others' start."""
    policy, checkpoint = policy_path(session.config, session.run.path), session.run.newest_checkpoint("ppo")
    async with asyncio.TaskGroup() as starting:
        starting.create_task(session.rollout_actors(session.config.rollout_actors.num_actors, policy))
        starting.create_task(session.rewards())
        await recorder.open()
        resumed = await asyncio.to_thread(resumption, session.run, session.config, checkpoint)
        queue = starting.create_task(_go_on(session, recorder, resumed))
        with session.start_up.phase("learner_group"):
            learners = await start_learners(session, checkpoint, resumed.kept + 1, lengths=resumed.lengths)
    return queue.result(), resumed, learners


async def _go_on(session: Session, recorder: RemoteActor, resumed: Resumption) -> RemoteActor:
    """The queue where the log says that the run stands, and the log told that this command goes on with it."""
    config = session.config
    session.run.rewind_metrics("ppo", resumed.trained)
    prompts = await task_prompts(session)
    group, num_steps = resumed.standing.next_group, config.learner.num_steps
    await recorder.begin(uuid.uuid4().hex, version=resumed.trained, group=group, num_steps=num_steps)
    queue = start_actor(
        TrajectoryQueue,
        config.trajectory_queue,
        prompts,
        run_seed=config.run.seed,
        num_steps=config.learner.num_steps,
        standing=resumed.standing,
        recorder=recorder,
        name="trajectory_queue",
        log_path=session.log_path("trajectory_queue"),
    )
    if story := resumed.story():
        session.view.note(story)
    return queue
