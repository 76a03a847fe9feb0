"""Choose the policy that a command uses: the newest one of a run, one at a step, the best one, or a model folder."""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

from cluster.errors import InputError
from cluster.files import read_json
from cluster.model_limits import context_length
from deploy.config.load import read_run_config
from deploy.config.schema import ModelSection, RunConfig, RunSection
from deploy.run.artifacts import best_policy, is_model_folder, newest_policy, origin_of, policy_at
from deploy.run.directory import RunDirectory
from deploy.run.layout import CONFIG
from deploy.run.open import changed_inputs, require_run
from rollout_actors.config import RolloutActorsConfig

Step = Annotated[
    int | None, typer.Option(min=0, metavar="N", help="Use the policy of PPO step N (0: the one PPO starts from).")
]
Best = Annotated[bool, typer.Option("--best", help="Use the checkpoint with the best evaluation during PPO.")]
RunOrModel = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory, or a model folder.")]
SHORTEST_RESPONSE = 16


class Selected(NamedTuple):
    """A policy's folder, where it comes from, and the run whose settings it is used with."""

    folder: Path
    origin: str
    config: RunConfig
    run: RunDirectory


@contextlib.contextmanager
def selected_policy(target: Path, *, step: int | None = None, best: bool = False) -> Iterator[Selected]:
    """Yield the policy of a run, by default its newest, or that of a model folder.

    A model folder has default settings, within its context, and writes its logs into a temporary folder. Raises
    InputError if there is no such policy.
    """
    if is_model_folder(target):
        require_one_choice(step, best, model=target)
        with tempfile.TemporaryDirectory(prefix="antiphon-") as folder:
            run = RunDirectory(Path(folder))
            yield Selected(target, "a model folder", settings_for(target), run)
    else:
        run = require_run(target)
        config = read_run_config(run.path / CONFIG)
        policy = select(config, run, step=step, best=best)
        yield Selected(policy.folder, policy.origin, config, run)


def select(config: RunConfig, run: RunDirectory, *, step: int | None, best: bool) -> Selected:
    """Return a policy of a run: its newest, the one at a step, or the best."""
    require_one_choice(step, best)
    if best:
        chosen = best_policy(config, run)
    else:
        chosen = newest_policy(config, run) if step is None else policy_at(config, run, step)
    for changed in changed_inputs(config, run) if chosen.folder == config.model.path else ():
        if changed.input.key == "model.path":
            print(f"changed since the run's last command: {changed}; it is used as it is now", file=sys.stderr)
    return Selected(chosen.folder, origin_of(run, chosen), config, run)


def require_one_choice(step: int | None, best: bool, *, model: Path | None = None) -> None:
    """Raise InputError if options that choose a policy contradict each other or the model folder."""
    option = "--best" if best else "--step"
    if best and step is not None:
        raise InputError("--best", "cannot be combined with --step: choose one of them")
    if model is not None and (best or step is not None):
        raise InputError(option, f"{model} is a model folder, which has a single policy")


def settings_for(model: Path) -> RunConfig:
    """Return default settings for a model folder; prompts and responses share its context."""
    defaults = RolloutActorsConfig()
    wanted = defaults.max_prompt_tokens + defaults.max_response_tokens + 1
    context = context_length(read_json(model / "config.json")) or wanted
    response = max(SHORTEST_RESPONSE, min(defaults.max_response_tokens, context // 2))
    prompt = max(1, min(defaults.max_prompt_tokens, context - response - 1))
    actors = defaults.model_copy(update={"max_prompt_tokens": prompt, "max_response_tokens": response})
    return RunConfig(model=ModelSection(path=model), run=RunSection(name="model"), rollout_actors=actors)
