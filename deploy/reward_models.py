"""The versions of a run's reward model: how a new one takes the old one's place, and what the summary says of them.

`reward_model/` is always whole. A new one is trained beside it and takes its place by two renames; where a kill comes
between them the next start of the run puts it in place. The old one goes to `reward_models/VERSION/`. Knows folders,
not how a model is trained; imports neither torch nor ray.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reward_service.config import REWARD_MODEL
from reward_service.scorer_files import weights_digest

if TYPE_CHECKING:
    from deploy.run_directory import RunDirectory

TRAINING, NEXT, REPLACED = ".reward_model.training", ".reward_model.next", ".reward_model.replaced"
ARCHIVE = "reward_models"
FEEDBACK = "feedback.parquet"
"""In TRAINING: what people prefer, as it was when training began."""
TOLD = (
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
    """Where a member of an ensemble lies: the first is the folder itself."""
    return folder / f"member-{member}" if member else folder


def publish(run: RunDirectory) -> dict[str, Any]:
    """Put the reward model that lies whole in TRAINING in the place of the run's; returns its entry in the summary."""
    (run.path / TRAINING / "reward_model").rename(run.path / NEXT)
    entry = entry_of(run.path / NEXT)
    settle(run)
    return entry


def settle(run: RunDirectory) -> None:
    """Finish what `publish` had begun, whatever it had done of it."""
    present, following, replaced = (run.path / name for name in ("reward_model", NEXT, REPLACED))
    if following.exists():
        _tell(run, entry_of(following), is_first=not present.exists() and not (run.path / ARCHIVE).exists())
        shutil.rmtree(run.path / TRAINING, ignore_errors=True)
        if present.exists():
            present.rename(_place_for(present, run.path))
        following.rename(present)
    shutil.rmtree(replaced, ignore_errors=True)


def _place_for(present: Path, run_path: Path) -> Path:
    """Where the old version is kept; one that is kept already is put aside to be deleted."""
    kept = run_path / ARCHIVE / weights_digest(present)
    if kept.exists():
        shutil.rmtree(run_path / REPLACED, ignore_errors=True)
        return run_path / REPLACED
    kept.parent.mkdir(exist_ok=True)
    return kept


def _tell(run: RunDirectory, entry: dict[str, Any], *, is_first: bool) -> None:
    """Write the version into the summary, once. What was best by an older one's rewards is best no longer."""
    told = run.summary().get("reward_model", {})
    versions = told.get("versions", [])
    if versions[-1:] != [entry]:
        run.update_summary({"reward_model.versions": [*versions, entry]})
    for stale in ("uncertainty", "num_broken", "num_unpaired"):
        if stale in told and stale not in entry:
            run.forget(f"reward_model.{stale}")
    run.update_summary({f"reward_model.{name}": value for name, value in entry.items() if name != "settings"})
    if not is_first:
        run.forget("held_out")


def entry_of(folder: Path) -> dict[str, Any]:
    """What the summary says of a reward model, read from its folder."""
    record = json.loads((folder / "training.json").read_text())
    num = int(record["num_examples"])
    num_feedback = num if record["data"] == [FEEDBACK] else int(record.get("num_more", 0))
    members = _members(folder)
    entry = {
        "version": f"{REWARD_MODEL}@{weights_digest(folder)}",
        "num_pairs": num,
        "num_pairs_by_source": {"stage": num - num_feedback, "feedback": num_feedback},
        "num_members": len(members),
        **{name: record[name] for name in TOLD},
        **{name: record[name] for name in ("num_broken", "num_unpaired") if name in record},
        "settings": record["settings"],
    }
    if len(members) > 1:
        from learner.calibration import ensemble_uncertainty

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
