"""A run's directory: its settings, status, summary, metrics and artefacts, and the lock that one process holds on it.

A stage is done when its artefact is there, whole; nothing else remembers it. Knows what lies where, not how it is
made; imports neither torch nor ray.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any, Literal

from cluster.errors import AntiphonError, InputError
from deploy.config.load import load_run_config, read_run_config
from deploy.config.schema import RunConfig
from deploy.config.toml import flat, to_toml
from deploy.reward_models import NEXT, TRAINING, settle
from reward_service.tokens import FILE as TOKENS_FILE

State = Literal["RUNNING", "DONE", "FAILED", "INTERRUPTED"]
CONFIG, LOCK, FEEDBACK, SERVING = "config.toml", ".lock", "feedback.sqlite", "serving"
RECORDS = "records"
"""The folder of the run's journal."""
EVALUATION = "evaluation"
KEPT = (LOCK, SERVING, TOKENS_FILE, FEEDBACK, f"{FEEDBACK}-wal", f"{FEEDBACK}-shm")
COMMANDS = {"reward_model": "reward-model", "evaluation": "evaluate"}
SUPERVISED = ("sft", "reward_model")
NUM_STEPS = "learner.num_steps"
JUDGED_BY = tuple(f"evaluation.{key}" for key in ("metrics", "num_samples", "greedy", "pass_reward", "num_prompts"))
"""What may change at any time: where it does, the policies are judged again."""
ADVERSARIAL, TRAINED_ON = "adversarial.", "adversarial_share"
"""Settings that may change likewise, unless prompts altered so are trained on."""
_WHEREABOUTS = {"run.name", "run.runs_dir"}
_CHECKPOINT = re.compile(r"step-(\d+)")


@dataclass(frozen=True, slots=True)
class Status:
    """What status.json says: where the run stands and where its Ray answers."""

    state: State = "RUNNING"
    stage: str | None = None
    step: int = 0
    ray_address: str | None = None
    error: str | None = None


class RunDirectory:
    """One run's files. Reading needs no lock; `open_run` gives the one writer."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: IO[str] | None = None

    def status(self) -> Status:
        """Where the run stands. Raises InputError when nothing was ever run here."""
        stored = _read_json(self.path / "status.json")
        if stored is None:
            raise InputError(str(self.path), "no run was started here")
        return Status(**stored)

    def update_status(self, **changes: Any) -> None:
        """Change the named fields of status.json."""
        status = Status(**(_read_json(self.path / "status.json") or {}))
        _write_json(self.path / "status.json", asdict(replace(status, **changes)))

    def summary(self) -> dict[str, Any]:
        """What the run has shown so far, as nested tables."""
        return _read_json(self.path / "summary.json") or {}

    def update_summary(self, values: Mapping[str, Any]) -> None:
        """Set values by dotted keys, such as ``reward_model.accuracy``; the others stay."""
        summary = self.summary()
        for key, value in values.items():
            *tables, name = key.split(".")
            table = summary
            for part in tables:
                table = table.setdefault(part, {})
            table[name] = value
        _write_json(self.path / "summary.json", summary)

    def forget(self, key: str) -> None:
        """Take a value, or a table of them, out of the summary by its dotted key, if it is there."""
        summary = self.summary()
        *tables, name = key.split(".")
        table = summary
        for part in tables:
            table = table.get(part, {})
        if table.pop(name, None) is not None:
            _write_json(self.path / "summary.json", summary)

    def metrics(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl; a last line that was cut short is left out."""
        path = self.path / "metrics.jsonl"
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        return [json.loads(line) for line in lines]

    def rewind_metrics(self, stage: str, step: int) -> None:
        """Drop the rows of `stage` after `step`: those steps are done again."""
        rows = self.metrics()
        kept = [row for row in rows if row.get("stage") != stage or row.get("step", 0) <= step]
        _write(self.path / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in kept))

    def last_ppo_step(self) -> dict[str, Any]:
        """The row of the last PPO step that counts; empty before the first."""
        rows = [row for row in self.metrics() if row.get("stage") == "ppo"]
        return rows[-1] if rows else {}

    def checkpoints(self, stage: str) -> list[Path]:
        """The whole checkpoints of a stage, oldest first. Whoever writes one renames it when it is whole."""
        folder = self.path / "checkpoints" / stage
        found = [path for path in folder.iterdir() if _CHECKPOINT.fullmatch(path.name)] if folder.is_dir() else []
        return sorted(found, key=checkpoint_step)

    def newest_checkpoint(self, stage: str) -> Path | None:
        """The checkpoint to go on from, if there is one."""
        return next(reversed(self.checkpoints(stage)), None)

    def best_checkpoint(self, stage: str) -> Path | None:
        """The checkpoint that was best so far, if there is one."""
        folder = self.path / "checkpoints" / stage
        record = _read_json(folder / "best.json")
        return folder / f"step-{record['step']:06d}" if record else None

    def keep_checkpoints(
        self, stage: str, *, newest: int, best: Path | None = None, every_steps: int | None = None
    ) -> None:
        """Delete all but the `newest` last, those of every so many steps and the best.

        The best is `best`, or without it the one that was best before.
        """
        if best is not None:
            _write_json(best.with_name("best.json"), {"step": checkpoint_step(best)})
        kept = {*self.checkpoints(stage)[-newest:], self.best_checkpoint(stage)}
        for path in self.checkpoints(stage):
            if path not in kept and (every_steps is None or checkpoint_step(path) % every_steps):
                shutil.rmtree(path)

    def is_done(self, stage: str, config: RunConfig) -> bool:
        """Whether the stage's artefact is there, whole."""
        if stage == "preferences":
            return config.data.preferences is not None or (self.path / "preferences.parquet").exists()
        if stage == "ppo":
            last = self.newest_checkpoint("ppo")
            finished = last is not None and checkpoint_step(last) >= config.learner.num_steps
            return finished and (self.path / "policy" / "config.json").exists()
        if stage == "evaluation":
            answers = self.path / EVALUATION / "after.parquet"
            return "after" in self.summary().get(EVALUATION, {}) and answers.exists()
        if stage == "reward_model" and (self.path / NEXT).exists():
            return True
        return (self.path / stage / "config.json").exists()

    def close(self) -> None:
        """Let another process open the run."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def lock(self) -> None:
        """Become the one writer. Raises InputError naming the process that is."""
        lock = (self.path / LOCK).open("a+")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.seek(0)
            holder = lock.read().strip() or "unknown"
            lock.close()
            raise InputError(str(self.path), f"another process is at work on this run ({holder})") from error
        lock.truncate(0)
        lock.write(f"pid {os.getpid()} on {socket.gethostname()}")
        lock.flush()
        self._lock = lock

    def clear(self) -> None:
        """Delete everything but the lock and what people have said: no command can make that again."""
        for child in self.path.iterdir():
            if child.name in KEPT:
                continue
            if child.is_dir() and not child.is_symlink():
                shutil.rmtree(child)
            else:
                child.unlink()


def checkpoint_step(path: Path) -> int:
    """The step of a checkpoint's folder."""
    return int(path.name.removeprefix("step-"))


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
        _write(path / CONFIG, to_toml(config))
        _rewind(run, config)
        _drop_checkpoints(run, config)
        yield run
    finally:
        run.close()


def _require_usable(path: Path) -> None:
    if path.exists() and not path.is_dir():
        raise InputError(str(path), "a file is in the way of the run directory")
    contents = [child.name for child in path.iterdir() if child.name not in KEPT] if path.is_dir() else []
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
    for stage in SUPERVISED:
        if run.is_done(stage, config) and not (stage == "reward_model" and (run.path / TRAINING).exists()):
            shutil.rmtree(run.path / "checkpoints" / stage, ignore_errors=True)


def require_stages(
    config: RunConfig, run: RunDirectory | None, stages: Sequence[str], *, have: Sequence[str] = ()
) -> None:
    """Raise InputError naming a stage that one of `stages` builds on and that is neither done nor asked for.

    `run` is None for a run that starts from nothing; those in `have` are not missed.
    """
    for stage in stages:
        for needed in _needs(config, stage):
            if needed not in (*stages, *have) and not (run and run.is_done(needed, config)):
                raise not_done(needed)


def _needs(config: RunConfig, stage: str) -> list[str]:
    start = ["sft"] if "sft" in config.run.stages else []
    judge = ["reward_model"] if config.served().needs_reward_model() else []
    needs = {
        "preferences": start,
        "reward_model": [*start, "preferences"],
        "ppo": [*start, *judge],
        "evaluation": ["ppo", *judge],
    }
    return needs.get(stage, [])


def not_done(stage: str) -> AntiphonError:
    """The error for a stage that something builds on and that has not been done."""
    trained = "not trained" if stage in ("sft", "reward_model") else "not done"
    return InputError(stage, f"{trained} (run antiphon {COMMANDS.get(stage, stage)})")


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    _write(path, json.dumps(content, indent=2) + "\n")


def _write(path: Path, text: str) -> None:
    """Replace a file whole: a reader sees the old text or the new one."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    os.replace(partial, path)
