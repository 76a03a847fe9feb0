"""Open a run directory for a command and refuse settings that changed."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
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
from deploy.run.inputs_digest import ChangedInput, InputDigests
from deploy.run.inputs_digest import refused as inputs_refused
from deploy.run.layout import CONFIG, EVALUATION, INPUTS, RECORDS, TRAINING
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

    With `fresh` its contents are deleted first. An evaluation that changed settings or inputs make invalid is deleted.
    Raises InputError, having changed nothing, if the folder holds something else, if another process has the lock, or
    if settings or contents of inputs changed that may not (`require_same_settings`, `require_same_inputs`).
    """
    _require_usable(path)
    changed = [] if fresh else require_same_settings(config, path, allow_changes=allow_changes, free=free)
    evaluates_again = any(change.reevaluates or change.key == NUM_STEPS for change in changed)
    run = RunDirectory(path)
    inputs = list[ChangedInput]()
    if not fresh:
        inputs = require_same_inputs(config, run, allow_changes=allow_changes, free=free, again=evaluates_again)
    try:
        path.mkdir(parents=True, exist_ok=True)
        run.lock()
    except OSError as error:
        raise InputError(str(path), f"cannot be written ({error.strerror})") from error
    try:
        if fresh:
            run.clear()
        settle(run)
        if evaluates_again or any(each.input.reevaluates for each in inputs):
            run.forget(EVALUATION)
        if any(map(_changes_held_out_rewards, changed)) or any(each.input.rescores for each in inputs):
            run.forget(HELD_OUT)
        here = config.run.model_copy(update={"working_directory": Path.cwd()})
        write_text(path / CONFIG, to_toml(config.model_copy(update={"run": here})))
        record_inputs(config, run)
        _rewind(run, config)
        _drop_checkpoints(run, config)
        yield run
    finally:
        run.close()


def _changes_held_out_rewards(change: Change) -> bool:
    """Return whether held-out rewards before and after the change are not comparable."""
    prompts = change.key.endswith(".evaluation") or change.key == "evaluation.num_prompts_during"
    return prompts or change.may_change == "recorded"


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


def require_same_inputs(
    config: RunConfig,
    run: RunDirectory,
    *,
    allow_changes: bool = False,
    free: Sequence[str] = (),
    again: bool = False,
) -> list[ChangedInput]:
    """Return the inputs whose contents changed and that a stage still reads, after a note on each change.

    Code may always change, and the preferences if the reward model is trained again (`free`). Raises InputError naming
    the inputs if one may not change, or only with `allow_changes`. An input may change while nothing has been made of
    it, and if only finished stages read it; if `again`, the evaluation is repeated.
    """
    changed = changed_inputs(config, run)
    begun = _begun_stages(config, run) if changed else set()
    changed = [each for each in changed if begun.intersection(each.input.read_by)]
    unfinished = {stage for stage in config.run.stages if not run.is_done(stage, config)}
    if again or any(each.input.reevaluates for each in changed):
        unfinished.add("evaluation")
    if "reward_model" in free:
        changed = [each for each in changed if each.input.key != "data.preferences"]
    read = [each for each in changed if unfinished.intersection(each.input.read_by)]
    if why := inputs_refused(read, allow_recorded=allow_changes):
        raise InputError(str(run.path), why)
    for each in changed:
        _note(f"changed since the last command: {each}; {_consequence(each, run, is_read=each in read)}")
    return read


def _begun_stages(config: RunConfig, run: RunDirectory) -> set[str]:
    """Return the stages that are done or that have left something from which they resume."""
    begun = {stage for stage in STAGES if run.is_done(stage, config) or run.newest_checkpoint(stage) is not None}
    if config.data.preferences is not None:
        begun.discard("preferences")
    if "ppo" not in begun and (run.path / RECORDS).is_dir():
        from cluster.journal.history import History

        begun |= {"ppo"} if History(run.path / RECORDS).counts().num_admitted else set()
    return begun


def changed_inputs(config: RunConfig, run: RunDirectory) -> list[ChangedInput]:
    """Return the inputs whose contents differ from those that the run recorded; none if it recorded none."""
    return InputDigests(config, run.path).changed() if (run.path / INPUTS).is_file() else []


def record_inputs(config: RunConfig, run: RunDirectory) -> None:
    """Record the digests of the inputs that exist now: at the start of a command, and once builders have run."""
    InputDigests(config, run.path).record(run, step=_last_step(run))


def _consequence(changed: ChangedInput, run: RunDirectory, *, is_read: bool) -> str:
    if not is_read:
        return "the stages that read it are done"
    parts = [f"used from step {_last_step(run) + 1} on"] if "ppo" in changed.input.read_by else []
    parts += ["the evaluation is repeated"] if changed.input.reevaluates else []
    parts += ["earlier held-out rewards are not compared with later ones"] if changed.input.rescores else []
    return ", ".join(parts) or "used from now on"


def _last_step(run: RunDirectory) -> int:
    """Return the last step of PPO in metrics.jsonl, or 0."""
    return int(run.last_ppo_step().get("step", 0))


def _note(text: str) -> None:
    print(text, file=sys.stderr)


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
