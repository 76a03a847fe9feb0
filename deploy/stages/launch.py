"""Runs the stages of one command in order, in one Ray session, and stops everything that it started."""

from __future__ import annotations

import asyncio
import importlib
import os
import signal
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial

from cluster.errors import AntiphonError
from deploy.config.schema import RunConfig
from deploy.data.prompts import screen_prompts
from deploy.run.directory import RunDirectory
from deploy.run.open import record_inputs
from deploy.run.stages import STAGES
from deploy.runtime.memory import PeakMemory
from deploy.runtime.session import Session
from deploy.stages.prepare import check_built_model, prepare, try_functions
from deploy.terminal.view import View
from reward_service.http.address import check_address
from reward_service.http.tokens import with_tokens

StageFunction = Callable[[Session], Awaitable[None]]


def run(config: RunConfig, run: RunDirectory, stages: Sequence[str], view: View) -> None:
    """Run the stages that are not done yet. Raises the error of the part that failed, or KeyboardInterrupt."""
    check_port(config, run, stages)
    session = Session(config, run, view)
    asyncio.run(in_session(session, partial(run_stages, session, stages), interruptible=True))


def run_function(config: RunConfig, run: RunDirectory, stage: str, function: StageFunction, view: View) -> None:
    """Run a function as a stage, whether the stage is done or not, such as another training of the reward model."""
    session = Session(config, run, view)
    asyncio.run(in_session(session, partial(_run_functions, session, {stage: function}), interruptible=True))


def check_port(config: RunConfig, run: RunDirectory, stages: Sequence[str]) -> None:
    """Raise InputError if a stage will serve rewards at an address that is taken or needs a token."""
    if any(STAGES[stage].uses_scorers and not run.is_done(stage, config) for stage in stages):
        check_address(with_tokens(config.reward_service, run.path), os.environ.get("ANTIPHON_TOKEN"))


async def in_session(session: Session, work: Callable[[], Awaitable[None]], *, interruptible: bool = False) -> None:
    """Connect the session to Ray, do the work, and close the session.

    The summary gets the peak memory. If `interruptible`, SIGTERM cancels the work; that needs the main thread.
    """
    main = asyncio.current_task()
    assert main is not None
    address = session.connect()
    if interruptible:
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, main.cancel)
    session.run.update_status(ray_address=address)
    peak = PeakMemory()
    measuring = asyncio.create_task(peak.follow())
    try:
        async with asyncio.TaskGroup() as tasks:
            following = tasks.create_task(session.follow_service())
            await work()
            following.cancel()
    except BaseExceptionGroup as group:
        raise _first_named(group) from None
    finally:
        measuring.cancel()
        session.run.update_summary({"peak_memory_bytes": peak.size_bytes})
        await session.close()


async def run_stages(session: Session, stages: Sequence[str]) -> None:
    """Run the stages that are not done yet, in the given order."""
    todo = [stage for stage in stages if not session.run.is_done(stage, session.config)]
    for stage in stages:
        if stage not in todo:
            session.view.note(f"{stage}: done before")
    await _run_functions(session, {stage: partial(_imported, stage) for stage in todo})


async def _imported(stage: str, session: Session) -> None:
    """Import the stage's function, which may bring RLlib and torch into this process, and run it."""
    module, _, function = STAGES[stage].function.partition(":")
    with session.start_up.phase("imports"):
        run_stage: StageFunction = getattr(importlib.import_module(module), function)
    await run_stage(session)


async def _run_functions(session: Session, functions: Mapping[str, StageFunction]) -> None:
    session.run.update_status(stage="prepare")
    async with asyncio.TaskGroup() as preparing:
        preparing.create_task(prepare(session))
        await asyncio.sleep(0)
        first = next(iter(functions), None)
        if first is not None and STAGES[first].is_supervised:
            _import_learners(session)
    record_inputs(session.config, session.run)
    check_built_model(session)
    await screen_prompts(session, _sampled_data(session, functions))
    if any(STAGES[stage].uses_scorers for stage in functions):
        await try_functions(session)
    for stage, function in functions.items():
        session.run.update_status(stage=stage, step=0)
        await function(session)


def _sampled_data(session: Session, functions: Mapping[str, StageFunction]) -> list[str]:
    """Return the data sets whose prompts these stages sample."""
    trained = ["prompts"] if functions.keys() & {"ppo", "preferences"} else []
    is_evaluated = functions.keys() & {"ppo", "evaluation"}
    return [*trained, "evaluation"] if is_evaluated else trained


def _import_learners(session: Session) -> None:
    """Import what a supervised stage needs while a builder runs in its own process: both take seconds."""
    with session.start_up.phase("imports"):
        importlib.import_module("learner.supervised.group")


def _first_named(group: BaseExceptionGroup) -> BaseException:
    """Return the first AntiphonError of a group, or its first error."""
    errors = list(_leaves(group))
    return next((error for error in errors if isinstance(error, AntiphonError)), errors[0])


def _leaves(error: BaseException) -> list[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        return [leaf for inner in error.exceptions for leaf in _leaves(inner)]
    return [error]
