"""Build the model and data of a run and try the user's functions."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster import user_code
from cluster.actors.remote import stream_task
from cluster.data.broken_rows import BrokenRows
from cluster.errors import EnvironmentFault, InputError
from cluster.files import replacing_folder
from cluster.scoring import ScoreRequest
from deploy.config.functions import scorer_paths
from deploy.run.artifacts import data_folder, data_path
from deploy.runtime.session import Session
from reward_service.scorers.trial import Trial
from reward_service.scorers.trial import try_functions as try_scorers
from rollout_actors.environments.pool import try_out
from rollout_actors.prompts import read_rows, scorer_columns

if TYPE_CHECKING:
    pass


async def prepare(session: Session) -> None:
    """Build the starting model and the data where the run file names builders."""
    config, run = session.config, session.run
    data = [
        (data_folder(run.path, name), task.builder, config.key_of(name, "builder"))
        for name, task in config.by_task().items()
    ]
    for target, path, key in ((run.path / "model", config.model.builder, "model.builder"), *data):
        if path and not target.exists():
            async for _ in stream_task(
                _build, path, key, target, seed=config.run.seed, name=key, log_path=session.log_path(key)
            ):
                pass


def _build(path: str, key: str, target: Path, *, seed: int) -> Iterator[None]:
    """Run a builder in a process of its own; what it writes appears whole or not at all."""
    builder = user_code.load(path, key)
    with replacing_folder(target) as partial:
        builder(partial, seed=seed)
    yield


async def try_functions(session: Session) -> None:
    """Raise InputError where a first try shows that an environment or a scorer breaks its protocol.

    Nothing is loaded yet. A scorer, which may bring anything with it, is called in a process of its own.
    """
    trials = [trial for task in session.config.by_task() if (trial := await _tried_environment(session, task))]
    timeout_s, name = session.config.reward_service.timeout_s, "scorer_trial"
    if trials:
        log_path = session.log_path(name)
        async for _ in stream_task(try_scorers, trials, timeout_s=timeout_s, name=name, log_path=log_path):
            pass


async def _tried_environment(session: Session, task: str) -> Trial | None:
    """Try a task's environment; what its scorers are to be tried with, None where they are ours or somebody else's."""
    config = session.config
    environment = config.by_task()[task].environment
    scorers = {} if config.reward_service.url is not None else scorer_paths(config, task)
    if environment.path is None and not scorers:
        return None
    prompt, columns = _first_prompt(session, task)
    if environment.path is not None:
        try:
            await try_out(environment, columns)
        except EnvironmentFault as fault:
            raise InputError(fault.where, fault.what) from fault
        columns["conversation"] = [{"role": "user", "content": prompt}, {"role": "assistant", "content": ""}]
    return Trial(scorers, ScoreRequest("trial", prompt, "", columns)) if scorers else None


def _first_prompt(session: Session, task: str) -> tuple[str, dict[str, Any]]:
    """The text of a task's first prompt, without a chat template, and its columns; nothing where there is none."""
    config = session.config
    path, reading = data_path(config, session.run.path, "prompts", task), config.data.reading()
    if not path.exists():
        return "", {}
    row = read_rows(path, reading, BrokenRows(reading.broken_rows))[0]
    prompt = row["prompt"]
    text = prompt if isinstance(prompt, str) else "\n".join(message["content"] for message in prompt)
    return text, scorer_columns(row)
