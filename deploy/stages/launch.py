"""Runs the stages of one command from first to last, in one Ray, and leaves nothing behind.

Knows the order of things; what a stage does is in `stages`, `ppo` and `evaluate`.
"""

from __future__ import annotations

import asyncio
import importlib
import os
import signal
from collections.abc import Awaitable, Callable, Sequence

from cluster.errors import AntiphonError
from deploy.config.schema import RunConfig
from deploy.evaluation.evaluate import evaluate
from deploy.run.directory import RunDirectory
from deploy.run.layout import SUPERVISED
from deploy.runtime.memory import PeakMemory
from deploy.runtime.session import Session
from deploy.stages.preferences import collect_preferences
from deploy.stages.prepare import prepare, try_functions
from deploy.stages.reward_model import retrain, run_reward_model
from deploy.stages.supervised import run_sft
from deploy.terminal.view import View
from reward_service.http.address import check_address
from reward_service.http.tokens import with_tokens


async def _ppo(session: Session) -> None:
    """PPO brings RLlib and torch into this process; commands without it are spared those seconds."""
    with session.start_up.phase("imports"):
        from deploy.stages.ppo import run_ppo

    await run_ppo(session)


STAGES: dict[str, Callable[[Session], Awaitable[None]]] = {
    "sft": run_sft,
    "preferences": collect_preferences,
    "reward_model": run_reward_model,
    "ppo": _ppo,
    "evaluation": evaluate,
}


def _import_learners(session: Session) -> None:
    """Bring in what a supervised stage needs while a builder works in its process: both take seconds."""
    with session.start_up.phase("imports"):
        importlib.import_module("learner.supervised.group")


AGAIN: dict[str, Callable[[Session], Awaitable[None]]] = {"reward_model": retrain}
"""What is done where a stage is asked for that is done already."""


def run(config: RunConfig, run: RunDirectory, stages: Sequence[str], view: View, *, again: bool = False) -> None:
    """Do the stages that are not done yet, or with `again` those of AGAIN whether they are or not.

    Raises the error of the part that failed, or KeyboardInterrupt.
    """
    if "ppo" in stages and not run.is_done("ppo", config):
        check_address(with_tokens(config.reward_service, run.path), os.environ.get("ANTIPHON_TOKEN"))
    asyncio.run(_run(Session(config, run, view), stages, again=again))


async def _run(session: Session, stages: Sequence[str], *, again: bool) -> None:
    main = asyncio.current_task()
    assert main is not None
    address = session.connect()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, main.cancel)
    session.run.update_status(ray_address=address)
    peak = PeakMemory()
    measuring = asyncio.create_task(peak.follow())
    try:
        async with asyncio.TaskGroup() as parts:
            following = parts.create_task(session.follow_service())
            await _in_order(session, stages, again=again)
            following.cancel()
    except BaseExceptionGroup as group:
        raise _own_error(group) from None
    finally:
        measuring.cancel()
        session.run.update_summary({"peak_memory_bytes": peak.size_bytes})
        await session.close()


async def _in_order(session: Session, stages: Sequence[str], *, again: bool) -> None:
    session.run.update_status(stage="prepare")
    wanted = [stage for stage in stages if again or not session.run.is_done(stage, session.config)]
    first = next(iter(wanted), None)
    async with asyncio.TaskGroup() as preparing:
        preparing.create_task(prepare(session))
        await asyncio.sleep(0)
        if first in SUPERVISED:
            _import_learners(session)
    if {"ppo", "evaluation"} & set(wanted):
        await try_functions(session)
    for stage in stages:
        if stage not in wanted:
            session.view.note(f"{stage}: done before")
            continue
        session.run.update_status(stage=stage, step=0)
        await (AGAIN if again else STAGES)[stage](session)


def _own_error(group: BaseExceptionGroup) -> BaseException:
    """Of several parts that ended together, the first with a name of its own."""
    errors = list(_leaves(group))
    return next((error for error in errors if isinstance(error, AntiphonError)), errors[0])


def _leaves(error: BaseException) -> list[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        return [leaf for inner in error.exceptions for leaf in _leaves(inner)]
    return [error]
