"""The letters task as the benchmarks use it: its run file with other lengths, its model and prompts in a folder.

Learner and engine have one thread each, so that each can use one of two cores.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.results import ROOT
from deploy.config.load import load_run_config
from deploy.config.schema import RunConfig
from examples.letters.data import build_data
from examples.letters.model import build_model
from rollout_actors.prompts import read_rows

ONE_THREAD = "learner.num_threads = 1"
RUN_FILE = ROOT / "examples" / "letters" / "run.toml"
FAST_RUN_FILE = RUN_FILE.with_name("fast.toml")


def letters_config(*, num_steps: int, max_policy_lag: int) -> RunConfig:
    """The letters run file with that many steps and that bound."""
    return load_run_config(
        RUN_FILE,
        [ONE_THREAD, f"learner.num_steps = {num_steps}", f"trajectory_queue.max_policy_lag = {max_policy_lag}"],
    )


def make_task(folder: Path) -> tuple[Path, list[dict[str, Any]]]:
    """Build model and data below `folder`; returns the model's folder and the training prompts."""
    model, data = folder / "model", folder / "data"
    for path, builder in ((model, build_model), (data, build_data)):
        if not path.exists():
            path.mkdir(parents=True)
            builder(path, seed=0)
    return model, read_rows(data / "prompts.parquet")
