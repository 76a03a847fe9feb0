"""Runs Antiphon from Python: in a script, or in a running event loop such as a notebook's.

Run the stages of a run file, as `antiphon train` does:

    from deploy.api import load, run

    config = load("examples/letters/run.toml", ["learner.num_steps = 20"])
    directory = run(config, on_step=lambda stage, metrics: print(stage, metrics["step"]))
    print(directory.summary())

In a notebook: `directory = await run_async(config)`.

Write a loop of your own over rollout actors, rewards and learners:

    async with open_session(config, stage="own loop") as session:
        task, rows = "", [{"prompt": "abc:"}, {"prompt": "bcd:"}]
        await prepare(session)                                    # builds model and data, if the run file says so
        policy = policy_path(config, session.run.path)
        learners = await start_learners(session, None, 1, lengths=((0, 10),))
        await learners.publish_initial()
        for step in range(1, 11):
            sampled = await session.answer(rows, policy, task=task, num=4, seed=f"step {step}")
            groups = [await scored_group(session, i, row, group, step=step)
                      for i, (row, group) in enumerate(zip(rows, sampled, strict=True))]
            result = await learners.step(step, groups)
            print(result.metrics["learner/reward_mean"])
            policy = session.run.path / "policies" / f"step-{step}"
            await learners.save_policy(policy)                    # the actors load it with the next `answer`
        await learners.shutdown()
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from cluster.errors import InputError
from cluster.trajectory import Segment, Trajectory
from deploy.config.inputs import check_inputs
from deploy.config.schema import STAGES, RunConfig
from deploy.evaluation.scoring import score
from deploy.run.artifacts import policy_path
from deploy.run.directory import RunDirectory
from deploy.run.open import open_run, read_target
from deploy.run.stages import require_stages
from deploy.runtime.session import OnStep, Session
from deploy.runtime.status import recorded
from deploy.stages.launch import check_port, in_session, run_stages
from deploy.stages.prepare import prepare
from deploy.terminal.view import View
from rollout_actors.conversations.conversation import Conversation

__all__ = ["load", "open_session", "policy_path", "prepare", "run", "run_async", "scored_group", "start_learners"]


def load(target: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Load the settings of a run file or run directory; an override is a line of TOML, as for `--set`.

    Raises InputError naming the file and the key.
    """
    return read_target(Path(target), overrides)[0]


def run(
    config: RunConfig,
    *,
    stages: Sequence[str] | None = None,
    directory: Path | None = None,
    fresh: bool = False,
    on_step: OnStep | None = None,
) -> RunDirectory:
    """Run the stages that are not done yet, from a script; returns the run directory.

    See `run_async`. Raises InputError if an event loop is running in this thread, and KeyboardInterrupt on Ctrl-C.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        work = run_async(config, stages=stages, directory=directory, fresh=fresh, on_step=on_step)
        return asyncio.run(work)
    raise InputError("deploy.api.run", "an event loop is running in this thread: use `await run_async(...)`")


async def run_async(
    config: RunConfig,
    *,
    stages: Sequence[str] | None = None,
    directory: Path | None = None,
    fresh: bool = False,
    on_step: OnStep | None = None,
) -> RunDirectory:
    """Run the stages that are not done yet in the running event loop; returns the run directory.

    stages: by default those of `run.stages`.
    directory: by default `run.runs_dir`/`run.name`, relative to the working directory.
    fresh: delete the run directory's contents first, except the human feedback.
    on_step: called with the stage's name and the metrics of each of its steps, as they are in metrics.jsonl.

    Cancellation interrupts the run; the same call resumes it. Raises InputError for wrong settings or inputs, and the
    error of the part that failed.
    """
    wanted, path = list(config.run.stages if stages is None else stages), directory or _directory(config)
    if unknown := [stage for stage in wanted if stage not in STAGES]:
        raise InputError("stages", f"no stage {unknown[0]!r}: there are {', '.join(STAGES)}")
    check_inputs(config)
    require_stages(config, None if fresh else RunDirectory(path), wanted)
    with open_run(config, path, fresh=fresh) as opened:
        if not all(opened.is_done(stage, config) for stage in wanted):
            with recorded(opened), View(config.run.name) as view:
                check_port(config, opened, wanted)
                session = Session(config, opened, view, on_step=on_step)
                await in_session(session, partial(run_stages, session, wanted))
    return RunDirectory(path)


@contextlib.asynccontextmanager
async def open_session(
    config: RunConfig, *, directory: Path | None = None, stage: str = "script", on_step: OnStep | None = None
) -> AsyncIterator[Session]:
    """Open a run directory and connect to Ray for a loop of your own; stops everything that was started at the end.

    The session starts rollout actors and the reward service when they are first used. `stage` is shown in status.json.
    """
    with open_run(config, directory or _directory(config)) as opened, recorded(opened), View(config.run.name) as view:
        session = Session(config, opened, view, on_step=on_step)
        opened.update_status(ray_address=session.connect(), stage=stage)
        try:
            yield session
        finally:
            await session.close()


async def start_learners(
    session: Session, checkpoint: Path | None, first_step: int, *, lengths: Sequence[tuple[int, int]]
) -> Any:
    """Start the PPO learner group at version `first_step` - 1: the checkpoint's, or the starting policy.

    `lengths` are pairs (version, number of steps), such as ((0, 10),) for ten steps. Returns a `PPOLearnerGroup`.
    """
    from deploy.ring.learners import start_learners as start

    return await start(session, checkpoint, first_step, lengths=tuple(lengths))


async def scored_group(
    session: Session,
    group: int,
    row: Mapping[str, Any],
    conversations: Sequence[Conversation],
    *,
    step: int,
    task: str = "",
) -> list[Trajectory]:
    """Score the conversations about one prompt row; returns them as a group that `learners.step` trains on.

    They must have been sampled from version `step` - 1. Raises RewardError if a reward is missing.
    """
    scores = await score(session, task, [row] * len(conversations), conversations)
    return [
        Trajectory(
            uid=f"{session.config.run.seed}-{step}-{group}-{index}",
            group=group,
            task=session.config.recorded_as(task),
            token_ids=conversation.token_ids,
            mask=conversation.mask,
            behavior_logprobs=conversation.logprobs,
            segments=[Segment(step - 1, turn.start, turn.length, 0, "session") for turn in conversation.turns],
            turns=conversation.turns,
            admission_index=group,
            finish_reason=conversation.finish_reason,
            reward=scored.reward - conversation.turn_rewards,
            reward_parts=scored.parts,
            scorer_version=scored.scorer_version,
            step=step,
            sequence_starts=conversation.sequence_starts,
        ).check()
        for index, (conversation, scored) in enumerate(zip(conversations, scores, strict=True))
    ]


def _directory(config: RunConfig) -> Path:
    return (config.run.runs_dir / config.run.name).absolute()
