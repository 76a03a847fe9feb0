"""Define the table of stages: what each needs, when it is done, and which function runs it.

To add a stage: its name in `deploy.config.schema.Stage` with its settings, a module in deploy/stages, one entry here,
and a test. Imports neither torch nor ray; a stage's function is imported when the stage runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from cluster.errors import InputError
from deploy.config.schema import RunConfig, StageName
from deploy.run.layout import EVALUATION, FEEDBACK, NEXT


class RunFiles(Protocol):
    """The part of a run directory that shows whether a stage is done."""

    path: Path

    def summary(self) -> dict[str, Any]:
        """Return the contents of summary.json."""

    def newest_checkpoint(self, stage: str) -> Path | None:
        """Return the newest checkpoint of a stage, `step-NUMBER`, or None."""


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage of a run.

    name: in `run.stages`, status.json and metrics.jsonl.
    function: dotted path of `async f(session)`, imported when the stage runs.
    is_done: returns whether the stage's artifact is complete.
    needs: stages that must be done before.
    follows: stages that must be done before if the run has them.
    takes_feedback: human feedback stands in for the stage `preferences`.
    uses_scorers: calls the tasks' scorers and environments; needs the reward model if it is one of the scorers.
    is_supervised: trains on a fixed data set; its checkpoints are deleted once it is done.
    command, help: its command line; without `help` the command is defined in deploy/commands.
    """

    name: StageName
    function: str
    is_done: Callable[[RunFiles, RunConfig], bool]
    command: str
    help: str | None = None
    needs: tuple[StageName, ...] = ()
    follows: tuple[StageName, ...] = ()
    takes_feedback: bool = False
    uses_scorers: bool = False
    is_supervised: bool = False

    def needed(self, config: RunConfig) -> list[str]:
        """Return the stages that must be done before this one under these settings."""
        needed: list[str] = [stage for stage in self.follows if stage in config.run.stages]
        needed += [stage for stage in self.needs if stage != "preferences" or config.data.preferences is None]
        if self.uses_scorers and config.served().needs_reward_model():
            needed.append("reward_model")
        return needed


def _has_sft(run: RunFiles, config: RunConfig) -> bool:
    return (run.path / "sft" / "config.json").exists()


def _has_preferences(run: RunFiles, config: RunConfig) -> bool:
    return config.data.preferences is not None or (run.path / "preferences.parquet").exists()


def _has_dpo(run: RunFiles, config: RunConfig) -> bool:
    return (run.path / "dpo" / "config.json").exists()


def _has_reward_model(run: RunFiles, config: RunConfig) -> bool:
    return (run.path / NEXT).exists() or (run.path / "reward_model" / "config.json").exists()


def _has_policy(run: RunFiles, config: RunConfig) -> bool:
    last = run.newest_checkpoint("ppo")
    finished = last is not None and checkpoint_step(last) >= config.learner.num_steps
    return finished and (run.path / "policy" / "config.json").exists()


def _has_evaluation(run: RunFiles, config: RunConfig) -> bool:
    return "after" in run.summary().get(EVALUATION, {}) and (run.path / EVALUATION / "after.parquet").exists()


def checkpoint_step(path: Path) -> int:
    """Return the step of a checkpoint's folder."""
    return int(path.name.removeprefix("step-"))


STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage(
            "sft",
            "deploy.stages.sft:run_sft",
            _has_sft,
            command="sft",
            help="Run supervised fine-tuning only; writes RUN/sft.",
            is_supervised=True,
        ),
        Stage(
            "preferences",
            "deploy.stages.preferences:collect_preferences",
            _has_preferences,
            command="preferences",
            help="Sample pairs of responses and have them labelled; writes RUN/preferences.parquet.",
            follows=("sft",),
        ),
        Stage(
            "dpo",
            "deploy.stages.dpo:run_dpo",
            _has_dpo,
            command="dpo",
            help="Train the policy on preferences (DPO, IPO or KTO); writes RUN/dpo.",
            follows=("sft",),
            needs=("preferences",),
            takes_feedback=True,
            is_supervised=True,
        ),
        Stage(
            "reward_model",
            "deploy.stages.reward_model:train_reward_model",
            _has_reward_model,
            command="reward-model",
            help="Train the reward model. For a run directory: train it again on all preferences so far.",
            follows=("sft", "dpo"),
            needs=("preferences",),
            is_supervised=True,
        ),
        Stage(
            "ppo",
            "deploy.stages.ppo:run_ppo",
            _has_policy,
            command="ppo",
            help="Run PPO only; writes RUN/policy.",
            follows=("sft", "dpo"),
            uses_scorers=True,
        ),
        Stage(
            "evaluation",
            "deploy.evaluation.evaluate:evaluate",
            _has_evaluation,
            command="evaluate",
            follows=("sft", "dpo", "ppo"),
            uses_scorers=True,
        ),
    )
}


def require_stages(config: RunConfig, run: RunFiles | None, stages: Sequence[str], *, have: Sequence[str] = ()) -> None:
    """Raise InputError naming a stage that one of `stages` needs and that is neither done nor among `stages`.

    `run` is None for a new run; stages in `have` count as done.
    """
    for stage in stages:
        given = ["preferences"] if run and STAGES[stage].takes_feedback and (run.path / FEEDBACK).exists() else []
        for needed in STAGES[stage].needed(config):
            if needed not in (*stages, *have, *given) and not (run and STAGES[needed].is_done(run, config)):
                raise not_done(needed)


def not_done(name: str) -> InputError:
    """Return the error for a stage that is needed and not done; it names the command to run."""
    stage = STAGES[name]
    state = "not trained" if stage.is_supervised else "not done"
    return InputError(name, f"{state} (run antiphon {stage.command})")
