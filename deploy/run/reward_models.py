"""Publish versions of a run's reward model and write their entries in the summary.

`reward_model/` is the current version and always complete. A new one is trained beside it and replaces it by two
renames; if the process is killed between them, the next start of the run finishes them. Every version is kept in
`reward_models/VERSION/`, which services read and which never changes. Imports neither torch nor ray.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.errors import InputError
from cluster.files import replacing_folder
from deploy.run.layout import ARCHIVE, NEXT, PREFERENCES, REPLACED, TRAINING
from reward_service.config.service import REWARD_MODEL
from reward_service.scorers.files import weights_digest

if TYPE_CHECKING:
    from deploy.run.directory import RunDirectory

REPORTED = (
    "accuracy",
    "held_out_accuracy",
    "held_out_loss",
    "ece",
    "nll",
    "margin_mean",
    "best_step",
    "num_examples",
    "num_cut",
    "num_dropped",
    "num_held_out",
)


def member_folder(folder: Path, member: int) -> Path:
    """Return the folder of a member of an ensemble; the first is the folder itself."""
    return folder / f"member-{member}" if member else folder


def publish(run: RunDirectory) -> dict[str, Any]:
    """Replace the run's reward model by the complete one in TRAINING; returns its entry in the summary."""
    (run.path / TRAINING / "reward_model").rename(run.path / NEXT)
    entry = entry_of(run.path / NEXT)
    settle(run)
    return entry


def settle(run: RunDirectory) -> None:
    """Finish an interrupted `publish`, at whichever point it stopped."""
    present, following, replaced = (run.path / name for name in ("reward_model", NEXT, REPLACED))
    if following.exists():
        kept = keep(following, run.path)
        is_first = not present.exists() and list(kept.parent.glob("[!.]*")) == [kept]
        _write_entry(run, entry_of(following), is_first=is_first)
        shutil.rmtree(run.path / TRAINING, ignore_errors=True)
        if present.exists():
            keep(present, run.path)
            shutil.rmtree(replaced, ignore_errors=True)
            present.rename(replaced)
        following.rename(present)
    shutil.rmtree(replaced, ignore_errors=True)


def published_folder(run_path: Path) -> Path | None:
    """Return the unchanging folder of the current reward model, or None if none is trained.

    Safe without the lock: returns the old or the new version while one is being replaced.
    """
    present = run_path / "reward_model"
    while (present / "config.json").is_file():
        before = present.stat().st_ino
        kept = keep(present, run_path)
        if present.stat().st_ino == before:
            return kept
    return None


def keep(folder: Path, run_path: Path) -> Path:
    """Copy `folder` to `reward_models/VERSION/` and return that: hard links to it, or copies if linking fails.

    Raises InputError if it cannot be written.
    """
    archive = run_path / ARCHIVE
    try:
        archive.mkdir(exist_ok=True)
        with (run_path / f".{ARCHIVE}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            kept = archive / weights_digest(folder)
            if not kept.exists():
                with replacing_folder(kept) as partial:
                    shutil.copytree(folder, partial, copy_function=_link, dirs_exist_ok=True)
            return kept
    except (OSError, shutil.Error) as error:
        raise InputError(str(archive), f"{folder} cannot be kept there ({error})") from error


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _write_entry(run: RunDirectory, entry: dict[str, Any], *, is_first: bool) -> None:
    """Write the version into the summary, once; delete the best checkpoint, which an older version selected."""
    current = run.summary().get("reward_model", {})
    versions = current.get("versions", [])
    if versions[-1:] != [entry]:
        run.update_summary({"reward_model.versions": [*versions, entry]})
    for stale in ("uncertainty", "num_broken", "num_unpaired"):
        if stale in current and stale not in entry:
            run.forget(f"reward_model.{stale}")
    run.update_summary({f"reward_model.{name}": value for name, value in entry.items() if name != "settings"})
    if not is_first:
        run.forget("held_out")


def entry_of(folder: Path) -> dict[str, Any]:
    """Return the summary's entry of a reward model, read from its folder."""
    record = json.loads((folder / "training.json").read_text())
    num = int(record["num_examples"])
    num_feedback = num if record["data"] == [PREFERENCES] else int(record.get("num_more", 0))
    members = _members(folder)
    entry = {
        "version": f"{REWARD_MODEL}@{weights_digest(folder)}",
        "num_pairs": num,
        "num_pairs_by_source": {"stage": num - num_feedback, "feedback": num_feedback},
        "num_members": len(members),
        **{name: record[name] for name in REPORTED},
        **{name: record[name] for name in ("num_broken", "num_unpaired") if name in record},
        "settings": record["settings"],
    }
    if len(members) > 1:
        from learner.supervised.calibration import ensemble_uncertainty

        entry["uncertainty"] = ensemble_uncertainty([_held_out_margins(member) for member in members])
    return entry


def _members(folder: Path) -> list[Path]:
    num = 1
    while member_folder(folder, num).is_dir():
        num += 1
    return [member_folder(folder, member) for member in range(num)]


def _held_out_margins(folder: Path) -> Sequence[float]:
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    rewards = pq.read_table(folder / "held_out_rewards.parquet")
    margins: list[float] = pc.subtract(rewards["chosen"], rewards["rejected"]).to_pylist()
    return margins
