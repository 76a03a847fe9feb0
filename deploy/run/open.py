"""Open a run directory for a command and refuse settings that changed."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from cluster.errors import InputError
from cluster.files import write_text
from deploy.config.changes import Change, changes, refused
from deploy.config.hub import pinned
from deploy.config.load import load_run_config, read_run_config
from deploy.config.schema import RunConfig
from deploy.config.toml import to_toml
from deploy.run.directory import NEVER_DELETED, RunDirectory
from deploy.run.layout import CONFIG, EVALUATION, TRAINING
from deploy.run.reward_models import settle
from deploy.run.stages import STAGES, checkpoint_step

NUM_STEPS, HELD_OUT = "learner.num_steps", "held_out"


def read_target(
    target: Path,
    overrides: Sequence[str] = (),
    *,
    name: str | None = None,
    runs_dir: Path | None = None,
    fresh: bool = False,
    pin: bool = True,
) -> tuple[RunConfig, Path]:
    """Return the settings and the run directory of TARGET, a run file or a run directory.

    The run directory may not exist yet. Names of the Hub get the commits that the run recorded, or their newest with
    `fresh`; without `pin` they stay as they are. Raises InputError if TARGET is neither, or its settings are wrong.
    """
    if target.is_dir():
        for option, value in (("--name", name), ("--runs-dir", runs_dir)):
            if value is not None:
                raise InputError(option, f"{target} is a run directory already")
        require_run(target)
        config = load_run_config(target / CONFIG, overrides, beside=False)
        return pinned(config, config.run.hub_commits) if pin else config, target.absolute()
    named = {"name": name, "runs_dir": runs_dir and str(runs_dir)}
    lines = [f"run.{key} = {json.dumps(value)}" for key, value in named.items() if value is not None]
    config = load_run_config(target, [*overrides, *lines])
    path = (config.run.runs_dir / config.run.name).absolute()
    return pinned(config, {} if fresh else _recorded_commits(path)) if pin else config, path


def _recorded_commits(path: Path) -> dict[str, str]:
    """Return the commits that a run has pinned; none if it has not begun or its settings cannot be read."""
    try:
        return read_run_config(path / CONFIG).run.hub_commits
    except InputError:  # opening the run reports it
        return {}


def require_run(path: Path) -> RunDirectory:
    """Return the run directory at `path`. Raises InputError if there is none."""
    if not path.is_dir():
        raise InputError(str(path), "no such run directory")
    if not (path / CONFIG).is_file():
        raise InputError(str(path), f"not a run directory (it has no {CONFIG})")
    return RunDirectory(path)


@contextlib.contextmanager
def open_run(
    config: RunConfig,
    path: Path,
    *,
    fresh: bool = False,
    allow_changes: bool = False,
    free: Sequence[str] = (),
) -> Iterator[RunDirectory]:
    """Create or resume a run directory; yields it locked.

    With `fresh` its contents are deleted first. An evaluation that changed settings make invalid is deleted. Raises
    InputError, having changed nothing, if the folder holds something else, if another process has the lock, or if
    settings changed that may not (`require_same_settings`).
    """
    _require_usable(path)
    changed = [] if fresh else require_same_settings(config, path, allow_changes=allow_changes, free=free)
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
        if any(change.reevaluates or change.key == NUM_STEPS for change in changed):
            run.forget(EVALUATION)
        if any(change.may_change == "recorded" for change in changed):
            run.forget(HELD_OUT)
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


def require_same_settings(
    config: RunConfig, path: Path, *, allow_changes: bool = False, free: Sequence[str] = ()
) -> list[Change]:
    """Return the settings in which `config` differs from those of the run in `path`.

    Raises InputError naming them if one may not change, by what its field says (`may_change`). `allow_changes` allows
    those that are recorded, and settings of the sections in `free` may always change.
    """
    stored = path / CONFIG
    if not stored.exists():
        return []
    try:
        before = read_run_config(stored)
    except InputError as error:
        advice = "another version of Antiphon wrote it: give the run another --name, or start over with --fresh"
        raise InputError(str(stored), f"{error} ({advice})") from error
    changed = changes(before, config, free=free)
    if why := refused(changed, allow_recorded=allow_changes):
        raise InputError(str(path), why)
    return changed


def _rewind(run: RunDirectory, config: RunConfig) -> None:
    """Drop the metrics of steps that will be repeated, except for PPO, which reads its own from the journal."""
    if not (run.path / "metrics.jsonl").exists():
        return
    for stage in config.run.stages:
        if stage != "ppo" and not run.is_done(stage, config):
            newest = run.newest_checkpoint(stage)
            run.rewind_metrics(stage, checkpoint_step(newest) if newest else 0)


def _drop_checkpoints(run: RunDirectory, config: RunConfig) -> None:
    """Delete the checkpoints of supervised stages that are done but were killed before deleting them."""
    for stage in (name for name, stage in STAGES.items() if stage.is_supervised):
        if run.is_done(stage, config) and not (stage == "reward_model" and (run.path / TRAINING).exists()):
            shutil.rmtree(run.path / "checkpoints" / stage, ignore_errors=True)
