"""`antiphon train` and one command for each stage; retraining of a reward model."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from cluster.errors import InputError
from deploy.commands.arguments import RunOptions, Target, with_run_options
from deploy.config.data_checks import recognised
from deploy.config.inputs import check_inputs
from deploy.config.schema import RunConfig
from deploy.config.toml import to_toml
from deploy.run.directory import RunDirectory
from deploy.run.open import open_run, read_target
from deploy.run.stages import Stage, require_stages
from deploy.runtime.status import running
from deploy.terminal.text import short_path
from deploy.terminal.view import View


@with_run_options
def train(target: Target, options: RunOptions) -> None:
    """Run every stage of a run that is not done yet.

    [dim]antiphon train examples/reviews/run.toml --set 'learner.num_steps = 20' --name short[/dim]
    """
    run_stages(target, options)


def stage_command(stage: Stage) -> Callable[..., None]:
    """Return the command that runs one stage."""

    @with_run_options
    def run(target: Target, options: RunOptions) -> None:
        run_stages(target, options, [stage.name])

    run.__doc__ = f"{stage.help}\n\n[dim]antiphon {stage.command} examples/reviews/run.toml[/dim]"
    return run


def run_stages(target: Path, options: RunOptions, stages: Sequence[str] | None = None) -> None:
    """Run `stages`, by default those of the run file, as far as they are not done."""
    config, path = read_target(
        target, options.set_ or (), name=options.name, runs_dir=options.runs_dir, fresh=options.fresh
    )
    if options.dry_run:
        print(to_toml(config), end="")
        return
    wanted = list(stages or config.run.stages)
    check_inputs(config)
    if wanted == ["reward_model"] and target.is_dir():
        _retrain(config, path, fresh=options.fresh)
        return
    require_stages(config, None if options.fresh else RunDirectory(path), wanted)
    with open_run(config, path, fresh=options.fresh, allow_changes=options.allow_changes) as run:
        if all(run.is_done(stage, config) for stage in wanted):
            _report_done(run, wanted)
            return
        with running(run), View(f"{config.run.name}  {short_path(path)}") as view:
            from deploy.stages.launch import run as launch

            for line in recognised(config):
                view.note(line)
            launch(config, run, wanted, view)
    print(f"done: {short_path(path)}", file=sys.stderr)


def _retrain(config: RunConfig, path: Path, *, fresh: bool) -> None:
    """Train a run's reward model again; only the settings of its own section may differ."""
    if fresh:
        raise InputError("--fresh", f"would delete the run; omit it to retrain the reward model of {path}")
    from deploy.stages.reward_model import retrain

    for port in retrain(config, path, View(f"{config.run.name}  {short_path(path)}")):
        print(f"published to the reward service on port {port}", file=sys.stderr)
    print(f"done: {short_path(path)}", file=sys.stderr)


def _report_done(run: RunDirectory, stages: Sequence[str]) -> None:
    run.update_status(state="DONE", ray_address=None, error=None)
    if "evaluation" in stages:
        evaluation = run.summary()["evaluation"]
        View().evaluated(evaluation.get("before", {}), evaluation["after"])
    print(f"{', '.join(stages)}: already done in {short_path(run.path)} (--fresh starts over)", file=sys.stderr)
