"""The PPO stage: starts the parts of the ring, trains, and writes `policy/`."""

from __future__ import annotations

import asyncio
import time
import uuid

from cluster.actors.control import RunControl, control_name
from cluster.actors.remote import RemoteActor, start_actor
from cluster.files import sha256_of_files
from cluster.journal.recorder import Recorder
from cluster.queue.trajectory_queue import TrajectoryQueue
from cluster.weights.store import WeightStore
from deploy.data.prompts import task_prompts
from deploy.ring.learners import start_learners
from deploy.ring.resuming import Resumption, resumption
from deploy.ring.ring import Parts, Ring
from deploy.run.artifacts import policy_path
from deploy.run.layout import RECORDS
from deploy.run.model_size import with_learning_rate
from deploy.runtime.session import Session
from learner.ppo.group import PPOLearnerGroup


async def run_ppo(session: Session, *, recorder_class: type = Recorder) -> None:
    """Train the policy and write it to `policy/`. Resumes from the newest checkpoint if there is one."""
    started = time.monotonic()
    session.view.stage("ppo", session.config.learner.num_steps)
    _set_learning_rate(session)
    parts = await _start_parts(session, recorder_class)
    ring = Ring(session, parts, started=started)
    try:
        await ring.run()
        policy = session.run.path / "policy"
        await ring.learners.save_policy(policy)
        digest = await asyncio.to_thread(sha256_of_files, sorted(policy.glob("*.safetensors")))
        session.run.update_summary({"policy_sha256": digest})
        await parts.recorder.close()
    finally:
        await ring.learners.shutdown()


def _set_learning_rate(session: Session) -> None:
    """Choose the learning rate by the policy's size if none is set, and print it; the journal records the choice."""
    given = session.config.learner.learning_rate
    session.config = with_learning_rate(session.config, policy_path(session.config, session.run.path))
    rate = session.config.learner.learning_rate
    session.run.update_summary({"ppo.learning_rate": rate})
    if given is None:
        session.view.note(f"ppo: learning rate {rate:.1e}, by the model's size (learner.learning_rate)")


async def _start_parts(session: Session, recorder_class: type) -> Parts:
    config = session.config
    control = start_actor(
        RunControl,
        config.rollout_actors.num_actors,
        name="run_control",
        registered_as=control_name(session.name),
        log_path=session.log_path("run_control"),
    )
    recorder = start_actor(
        recorder_class,
        session.run.path / RECORDS,
        name="recorder",
        log_path=session.log_path("recorder"),
        pinned_and_restarted=True,
    )
    store = start_actor(WeightStore, name="weight_store", log_path=session.log_path("weight_store"))
    queue, resumed, group = await _start_slow_parts(session, recorder)
    return Parts(control=control, queue=queue, store=store, recorder=recorder, group=group, resumed=resumed)


async def _start_slow_parts(session: Session, recorder: RemoteActor) -> tuple[RemoteActor, Resumption, PPOLearnerGroup]:
    """Start engines, reward service, queue and learner group concurrently; one failure cancels the others."""
    policy, checkpoint = policy_path(session.config, session.run.path), session.run.newest_checkpoint("ppo")
    async with asyncio.TaskGroup() as starting:
        starting.create_task(session.rollout_actors(session.config.rollout_actors.num_actors, policy))
        starting.create_task(session.rewards())
        await recorder.open()
        resumed = await asyncio.to_thread(resumption, session.run, session.config, checkpoint)
        queue = starting.create_task(_start_queue(session, recorder, resumed))
        with session.start_up.phase("learner_group"):
            group = await start_learners(
                session, checkpoint, resumed.kept + 1, lengths=resumed.lengths, phases=resumed.phases
            )
    return queue.result(), resumed, group


async def _start_queue(session: Session, recorder: RemoteActor, resumed: Resumption) -> RemoteActor:
    """Restore the queue from the journal, and record that this command continues the run."""
    config = session.config
    session.run.rewind_metrics("ppo", resumed.trained)
    prompts = await task_prompts(session)
    group, num_steps = resumed.standing.next_group, config.learner.num_steps
    resamples = config.learner.zero_variance_groups == "resample"
    await recorder.begin(
        uuid.uuid4().hex,
        version=resumed.trained,
        group=group,
        num_steps=num_steps,
        settings=config.model_dump_json(),
    )
    queue = start_actor(
        TrajectoryQueue,
        config.trajectory_queue,
        prompts,
        run_seed=config.run.seed,
        num_steps=num_steps,
        standing=resumed.standing,
        recorder=recorder,
        max_resamples=config.learner.max_group_resamples if resamples else 0,
        name="trajectory_queue",
        log_path=session.log_path("trajectory_queue"),
    )
    if summary := resumed.summary():
        session.view.note(summary)
    return queue
