"""Read and write a run's directory: status, summary, metrics, checkpoints, and the lock of its single writer.

A stage is done if its artifact is complete; there is no other record of it. Imports neither torch nor ray.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any, Literal, TypeVar

from cluster.errors import InputError
from cluster.files import read_json, write_json, write_text
from deploy.config.schema import RunConfig
from deploy.run.layout import FEEDBACK, ID, LOCK, SERVING
from deploy.run.stages import STAGES, checkpoint_step
from reward_service.http.tokens import FILE as TOKENS_FILE

State = Literal["RUNNING", "DONE", "FAILED", "INTERRUPTED"]
NEVER_DELETED = (LOCK, ID, SERVING, TOKENS_FILE, FEEDBACK, f"{FEEDBACK}-wal", f"{FEEDBACK}-shm")
_CHECKPOINT = re.compile(r"step-(\d+)")
_Key = TypeVar("_Key", bound="str | tuple[str, ...]")


@dataclass(frozen=True, slots=True)
class Status:
    """The contents of status.json: state, stage, step and Ray address."""

    state: State = "RUNNING"
    stage: str | None = None
    step: int = 0
    ray_address: str | None = None
    error: str | None = None


class RunDirectory:
    """One run's files. Reading needs no lock; `open_run` returns the single writer."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: IO[str] | None = None

    def status(self) -> Status:
        """Return the status. Raises InputError if no run was started here."""
        stored = _read_json(self.path / "status.json")
        if stored is None:
            raise InputError(str(self.path), "no run was started here")
        return Status(**stored)

    def update_status(self, **changes: Any) -> None:
        """Change the named fields of status.json."""
        status = Status(**(_read_json(self.path / "status.json") or {}))
        write_json(self.path / "status.json", asdict(replace(status, **changes)))

    def summary(self) -> dict[str, Any]:
        """Return the contents of summary.json as nested tables."""
        return _read_json(self.path / "summary.json") or {}

    def update_summary(self, values: Mapping[_Key, Any]) -> None:
        """Set values by dotted keys, such as ``reward_model.accuracy``; numbers that JSON cannot hold become null.

        A tuple names a key whose last part may hold dots, such as the name of a user's metric.
        """
        summary = self.summary()
        for key, value in values.items():
            *tables, name = key if isinstance(key, tuple) else key.split(".")
            table = summary
            for part in tables:
                table = table.setdefault(part, {})
            table[name] = value
        write_json(self.path / "summary.json", summary)

    def forget(self, key: str) -> None:
        """Delete a value or table of the summary by its dotted key, if it exists."""
        summary = self.summary()
        *tables, name = key.split(".")
        table = summary
        for part in tables:
            table = table.get(part, {})
        if table.pop(name, None) is not None:
            write_json(self.path / "summary.json", summary)

    def metrics(self) -> list[dict[str, Any]]:
        """Return the rows of metrics.jsonl, without an incomplete last line."""
        path = self.path / "metrics.jsonl"
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        return [json.loads(line) for line in lines]

    def rewind_metrics(self, stage: str, step: int) -> None:
        """Delete the rows of `stage` after `step`, which will be repeated."""
        rows = self.metrics()
        kept = [row for row in rows if row.get("stage") != stage or row.get("step", 0) <= step]
        write_text(self.path / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in kept))

    def last_ppo_step(self) -> dict[str, Any]:
        """Return the row of the last PPO step, or an empty one."""
        rows = [row for row in self.metrics() if row.get("stage") == "ppo"]
        return rows[-1] if rows else {}

    def checkpoints(self, stage: str) -> list[Path]:
        """Return the complete checkpoints of a stage, oldest first; incomplete ones have other names."""
        folder = self.path / "checkpoints" / stage
        found = [path for path in folder.iterdir() if _CHECKPOINT.fullmatch(path.name)] if folder.is_dir() else []
        return sorted(found, key=checkpoint_step)

    def newest_checkpoint(self, stage: str) -> Path | None:
        """Return the newest checkpoint of a stage, or None."""
        return next(reversed(self.checkpoints(stage)), None)

    def best_checkpoint(self, stage: str) -> Path | None:
        """Return the best checkpoint of a stage so far, or None."""
        folder = self.path / "checkpoints" / stage
        record = _read_json(folder / "best.json")
        return folder / f"step-{record['step']:06d}" if record else None

    def keep_checkpoints(
        self, stage: str, *, newest: int, best: Path | None = None, every_steps: int | None = None
    ) -> None:
        """Delete all checkpoints except the `newest` last, those of every `every_steps` steps and the best.

        The best is `best`, or the previous best if that is None.
        """
        if best is not None:
            write_json(best.with_name("best.json"), {"step": checkpoint_step(best)})
        kept = {*self.checkpoints(stage)[-newest:], self.best_checkpoint(stage)}
        for path in self.checkpoints(stage):
            if path not in kept and (every_steps is None or checkpoint_step(path) % every_steps):
                shutil.rmtree(path)

    def is_done(self, stage: str, config: RunConfig) -> bool:
        """Return whether the stage's artifact is complete."""
        return STAGES[stage].is_done(self, config)

    def name_on_ray(self, run_name: str) -> str:
        """Return the name under which the run's parts are registered on a Ray that other runs may share.

        It is the same for every command on this run directory, so that a command finds what a killed one has left, and
        another one for every other run directory, a copy of this one included.
        """
        stored = self.path / ID
        token = stored.read_text() if stored.exists() else ""
        digest = hashlib.blake2b(f"{token}:{self.path.resolve()}".encode("utf-8", "surrogatepass"), digest_size=4)
        return f"{run_name}-{digest.hexdigest()}"

    @property
    def is_locked(self) -> bool:
        """Whether this object holds the lock of the single writer."""
        return self._lock is not None

    def close(self) -> None:
        """Release the lock."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def lock(self) -> None:
        """Take the lock of the single writer, and give the run its id if it has none.

        Raises InputError naming the process that holds the lock.
        """
        lock = (self.path / LOCK).open("a+")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.seek(0)
            holder = lock.read().strip() or "unknown"
            lock.close()
            raise InputError(str(self.path), f"another process is using this run ({holder})") from error
        lock.truncate(0)
        lock.write(f"pid {os.getpid()} on {socket.gethostname()}")
        lock.flush()
        self._lock = lock
        if not (self.path / ID).exists():
            write_text(self.path / ID, secrets.token_hex(8))

    def clear(self) -> None:
        """Delete everything except the lock and the human feedback, which cannot be regenerated."""
        for child in self.path.iterdir():
            if child.name in NEVER_DELETED:
                continue
            if child.is_dir() and not child.is_symlink():
                shutil.rmtree(child)
            else:
                child.unlink()


def _read_json(path: Path) -> dict[str, Any] | None:
    return read_json(path) if path.exists() else None
