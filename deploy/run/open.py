"""Open a run directory for a command and refuse settings that changed."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster.errors import InputError
from cluster.files import write_text
from deploy.config.load import load_run_config, read_run_config
from deploy.config.schema import RunConfig
from deploy.config.toml import flat, to_toml
from deploy.run.directory import NEVER_DELETED, RunDirectory
from deploy.run.layout import CONFIG, EVALUATION, TRAINING
from deploy.run.reward_models import settle
from deploy.run.stages import STAGES, checkpoint_step

NUM_STEPS = "learner.num_steps"


JUDGED_BY = tuple(f"evaluation.{key}" for key in ("metrics", "num_samples", "greedy", "pass_reward", "num_prompts"))
"""What may change at any time: where it does, the policies are judged again."""


ADVERSARIAL, TRAINED_ON = "adversarial.", "adversarial_share"
"""Settings that may change likewise, unless prompts altered so are trained on."""


_WHEREABOUTS = {"run.name", "run.runs_dir"}


def read_target(
    target: Path, overrides: Sequence[str] = (), *, name: str | None = None, runs_dir: Path | None = None
) -> tuple[RunConfig, Path]:
    """The settings and the run directory that TARGET (a run file or a run directory) stands for.

    Raises InputError when it is neither, or its settings are wrong. The run directory may not exist yet.
    """
    if target.is_dir():
        for option, value in (("--name", name), ("--runs-dir", runs_dir)):
            if value is not None:
                raise InputError(option, f"{target} is a run directory already")
        require_run(target)
        return load_run_config(target / CONFIG, overrides, beside=False), target.absolute()
    named = {"name": name, "runs_dir": runs_dir and str(runs_dir)}
    lines = [f"run.{key} = {json.dumps(value)}" for key, value in named.items() if value is not None]
    config = load_run_config(target, [*overrides, *lines])
    return config, (config.run.runs_dir / config.run.name).absolute()


def require_run(path: Path) -> RunDirectory:
    """The run directory at `path`. Raises InputError when there is none."""
    if not path.is_dir():
        raise InputError(str(path), "no such run directory")
    if not (path / CONFIG).is_file():
        raise InputError(str(path), f"not a run directory (it has no {CONFIG})")
    return RunDirectory(path)


@contextlib.contextmanager
def open_run(
    config: RunConfig, path: Path, *, fresh: bool = False, may_change: Sequence[str] = ()
) -> Iterator[RunDirectory]:
    """The run directory, made or gone on with, locked while the context lasts.

    With `fresh` its contents are deleted first. Raises InputError, having changed nothing, when it holds something
    else, when its settings were others (but those of the sections in `may_change`), and when another process is at
    work on it. With more PPO steps than before the run is extended, and what is judged otherwise is judged again:
    then what was evaluated will be evaluated anew.
    """
    _require_usable(path)
    if not fresh:
        require_same_settings(config, path, may_change)
    run = RunDirectory(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        run.lock()
    except OSError as error:
        raise InputError(str(path), f"cannot be written ({error.strerror})") from error
    try:
        if fresh:
            run.clear()
        settle(run)
        if _is_extended(config, path) or _is_judged_otherwise(config, path):
            run.forget(EVALUATION)
        write_text(path / CONFIG, to_toml(config))
        _rewind(run, config)
        _drop_checkpoints(run, config)
        yield run
    finally:
        run.close()


def _require_usable(path: Path) -> None:
    if path.exists() and not path.is_dir():
        raise InputError(str(path), "a file is in the way of the run directory")
    contents = [child.name for child in path.iterdir() if child.name not in NEVER_DELETED] if path.is_dir() else []
    if contents and CONFIG not in contents:
        raise InputError(str(path), f"not a run directory (it has no {CONFIG}) and not empty; choose another --name")


def _is_judged_otherwise(config: RunConfig, path: Path) -> bool:
    """Whether the policies are to be judged by other settings than they were."""
    if not (path / CONFIG).exists():
        return False
    before, now = flat(read_run_config(path / CONFIG)), flat(config)
    return any(before.get(key) != now.get(key) for key in {**before, **now} if _judges(key, now))


def _judges(key: str, settings: Mapping[str, Any]) -> bool:
    """Whether a setting only says how the policies are judged, so that it may change at any time."""
    of_task = re.fullmatch(r"(tasks\.[^.]+\.)(.+)", key)
    where, name = of_task.groups() if of_task else ("", key)
    if name.startswith(ADVERSARIAL):
        return not settings.get(f"{where or 'data.'}{TRAINED_ON}")
    return name == "metrics" if where else key in JUDGED_BY


def _is_extended(config: RunConfig, path: Path) -> bool:
    """Whether the run is to do more PPO steps than it was told before."""
    stored = path / CONFIG
    return stored.exists() and config.learner.num_steps > read_run_config(stored).learner.num_steps


def require_same_settings(config: RunConfig, path: Path, may_change: Sequence[str] = ()) -> None:
    """Raise InputError naming the settings in which `config` differs from those the run was started with.

    The sections in `may_change` may differ, and what is JUDGED_BY, with what is ADVERSARIAL unless it is trained on;
    more PPO steps are allowed: they extend the run.
    """
    stored = path / CONFIG
    if not stored.exists():
        return
    way_out = "--fresh starts over, --name makes another run"
    try:
        before, now = flat(read_run_config(stored)), flat(config)
    except InputError as error:
        raise InputError(str(stored), f"{error} ({way_out})") from error
    free = {*_WHEREABOUTS, *(k for k in {**before, **now} if _judges(k, now) or k.partition(".")[0] in may_change)}
    free |= {NUM_STEPS} if now[NUM_STEPS] > before[NUM_STEPS] else set()
    changed = [key for key in {**before, **now} if before.get(key) != now.get(key) and key not in free]
    if changed:
        listed = ", ".join(f"{key} (was {_shown(before.get(key))}, now {_shown(now.get(key))})" for key in changed)
        raise InputError(str(path), f"settings have changed: {listed}; {way_out}")


def _shown(value: Any) -> str:
    return "unset" if value is None else json.dumps(value)


def _rewind(run: RunDirectory, config: RunConfig) -> None:
    """Forget the metrics of steps that will be done again; PPO's log says which of its steps those are."""
    if not (run.path / "metrics.jsonl").exists():
        return
    for stage in config.run.stages:
        if stage != "ppo" and not run.is_done(stage, config):
            newest = run.newest_checkpoint(stage)
            run.rewind_metrics(stage, checkpoint_step(newest) if newest else 0)


def _drop_checkpoints(run: RunDirectory, config: RunConfig) -> None:
    """Delete what a supervised stage that was killed in its last moment has left beside its artefact."""
    for stage in (name for name, stage in STAGES.items() if stage.is_supervised):
        if run.is_done(stage, config) and not (stage == "reward_model" and (run.path / TRAINING).exists()):
            shutil.rmtree(run.path / "checkpoints" / stage, ignore_errors=True)
