"""Prepares a run: builds its model and data, and tries the user's functions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster import user_code
from cluster.data.invalid_rows import BrokenRows
from cluster.errors import EnvironmentFault, InputError
from cluster.files import replacing_folder
from cluster.scoring import ScoreRequest, with_trainer_state
from deploy.config.functions import scorer_paths
from deploy.config.inputs import check_model
from deploy.run.artifacts import data_folder, data_path, policy_path
from deploy.run.chat_model import prepare_chat_model
from deploy.runtime.session import Session
from reward_service.scorers.trial import Trial
from reward_service.scorers.trial import try_functions as try_scorers
from rollout_actors.config import EnvironmentConfig
from rollout_actors.environments.pool import try_out
from rollout_actors.parser_choice import choose_parsers
from rollout_actors.prompts import read_rows, scorer_columns


async def prepare(session: Session) -> None:
    """Build the starting model and the data sets for which the run file names builders."""
    config, run = session.config, session.run
    model = config.model.builder if config.model.path is None else None
    builders = [(run.path / "model", model, "model.builder", config.model.settings)]
    builders += [
        (data_folder(run.path, name), task.builder, config.key_of(name, "builder"), task.settings)
        for name, task in config.by_task().items()
    ]
    for target, builder, key, settings in builders:
        if builder and not target.exists():
            await session.run_task(_build, builder, key, target, settings, seed=config.run.seed, name=key)
    prepare_chat_model(config, run.path / "model")


def check_built_model(session: Session) -> None:
    """Raise InputError if the settings do not fit the model that the builder has written."""
    if session.config.model.path is None:
        check_model(session.config, session.run.path / "model")


def _build(builder: str, key: str, target: Path, settings: Mapping[str, Any], *, seed: int) -> Iterator[None]:
    """Call a builder, in a separate process; the target folder appears complete or not at all."""
    build = user_code.load(builder, key)
    with replacing_folder(target) as partial:
        build(partial, seed=seed, **settings)
    yield


async def try_functions(session: Session) -> None:
    """Try each task's environment and scorer once; raises InputError if one breaks its protocol.

    Called before any engine is loaded. Scorers run in a separate process, since they may import anything. A scorer that
    does not apply to the first prompt is said in a note.
    """
    trials = [trial for task in session.config.by_task() if (trial := await _try_environment(session, task))]
    if trials:
        timeout_s = session.config.reward_service.timeout_s
        for note in await session.run_task(try_scorers, trials, timeout_s=timeout_s, name="scorer_trial"):
            session.view.note(note)


async def _try_environment(session: Session, task: str) -> Trial | None:
    """Try a task's environment; return what to try its scorers with, or None if none of them is a user's function."""
    config = session.config
    environment = config.by_task()[task].environment
    scorers = {} if config.reward_service.url is not None else scorer_paths(config, task)
    if environment.path is None and not scorers:
        return None
    prompt, row = _first_prompt(session, task)
    columns = scorer_columns(row)
    if environment.path is not None:
        try:
            tools = await try_out(environment, columns)
        except EnvironmentFault as fault:
            raise InputError(fault.where, fault.what) from fault
        _note_parsers(session, environment, tools)
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": ""}]
        columns |= {"conversation": messages, "messages": messages[:1]}
    elif row and not isinstance(row["prompt"], str):
        columns["messages"] = list(row["prompt"])
    columns |= {"completion_ids": [], "finish_reason": "stop"}
    request = ScoreRequest("trial", prompt, "", columns)
    num_steps = config.learner.num_steps
    return Trial(scorers, with_trainer_state(request, global_step=0, max_steps=num_steps)) if scorers else None


def _note_parsers(session: Session, environment: EnvironmentConfig, tools: Sequence[str]) -> None:
    """Print which parsers read the policy's calls, if the environment offers functions."""
    if tools:
        chosen = choose_parsers(policy_path(session.config, session.run.path), environment)
        session.view.note(
            f"functions of the environment: {', '.join(tools)}; calls are read in the form {chosen.tool} "
            f"(environment.tool_parser), thoughts in the form {chosen.reasoning} (environment.reasoning_parser)"
        )


def _first_prompt(session: Session, task: str) -> tuple[str, dict[str, Any]]:
    """Return the text of a task's first prompt, without a chat template, and its row; empty if there is none."""
    config = session.config
    path, reading = data_path(config, session.run.path, "prompts", task), config.data.reading()
    if not path.exists():
        return "", {}
    row = read_rows(path, reading, BrokenRows(reading.broken_rows))[0]
    prompt = row["prompt"]
    text = prompt if isinstance(prompt, str) else "\n".join(message.get("content") or "" for message in prompt)
    return text, row
