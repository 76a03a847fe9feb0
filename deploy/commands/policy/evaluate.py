"""`antiphon evaluate`: evaluate a run's policy on held-out prompts and compare it with another policy."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from cluster.errors import InputError
from deploy.commands.arguments import RunOptions, Target, with_run_options
from deploy.config.inputs import check_inputs
from deploy.config.schema import RunConfig
from deploy.config.toml import to_toml
from deploy.run.directory import RunDirectory
from deploy.run.layout import EVALUATION
from deploy.run.open import open_run, read_target, require_run
from deploy.run.stages import require_stages
from deploy.runtime.status import running
from deploy.terminal.text import short_path
from deploy.terminal.view import View


@with_run_options
def evaluate(
    target: Target,
    options: RunOptions,
    num_samples: Annotated[
        int | None, typer.Option(min=1, metavar="K", help="Responses to each prompt. Evaluates again if changed.")
    ] = None,
    greedy: Annotated[
        bool, typer.Option("--greedy", help="Also evaluate greedy responses. Evaluates again if changed.")
    ] = False,
    against: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Compare with the policy of this run, prompt by prompt.")
    ] = None,
    before: Annotated[
        bool, typer.Option("--before", help="With --against: compare with its policy before PPO.")
    ] = False,
    task: Annotated[str | None, typer.Option(metavar="NAME", help="Show only this task of several.")] = None,
    list_: Annotated[int, typer.Option("--list", min=0, help="How many prompts with worse responses to list.")] = 5,
) -> None:
    """Evaluate the policy before and after PPO on held-out prompts.

    Stores the responses in RUN/evaluation. With --against, a task is compared with the task of the same name in the
    other run, or with a single-task run.

    [dim]antiphon evaluate runs/reviews --num-samples 4 --against runs/hacked[/dim]
    """
    lines = [f"evaluation.num_samples = {num_samples}"] if num_samples is not None else []
    lines += ["evaluation.greedy = true"] if greedy else []
    lines = [*(options.set_ or ()), *lines]
    config, path = read_target(target, lines, name=options.name, runs_dir=options.runs_dir)
    if options.dry_run:
        print(to_toml(config), end="")
        return
    other = require_run(against).path / EVALUATION / f"{'before' if before else 'after'}.parquet" if against else None
    if other is not None and not other.exists():
        raise InputError(str(against), "has no stored responses (run antiphon evaluate on it)")
    check_inputs(config)
    shown = _selected_task(config, task)
    _evaluate(config, path, shown, fresh=options.fresh, allow_changes=options.allow_changes)
    _print_changes(path, other, shown, list_)
    print(f"done: {short_path(path)}", file=sys.stderr)


def _selected_task(config: RunConfig, task: str | None) -> str:
    """Return the task to show, or '' to show all. Raises InputError with the names of the tasks."""
    names = {config.recorded_as(name): name for name in config.by_task()}
    if task is not None and task not in names:
        raise InputError("--task", f"no task {task!r}; the tasks are {', '.join(names)}")
    return names[task] if task is not None else ""


def _evaluate(config: RunConfig, path: Path, task: str, *, fresh: bool, allow_changes: bool) -> None:
    """Evaluate the run's policies, unless the same evaluation is already done."""
    require_stages(config, None if fresh else RunDirectory(path), [EVALUATION])
    with open_run(config, path, fresh=fresh, allow_changes=allow_changes) as run:
        if run.is_done(EVALUATION, config):
            summary = run.summary()[EVALUATION]
            run.update_status(state="DONE", ray_address=None, error=None)
            View().evaluated(summary.get("before", {}), summary["after"], task=task)
            return
        with running(run), View(f"{config.run.name}  {short_path(path)}") as view:
            from deploy.stages.launch import run as launch

            launch(config, run, [EVALUATION], view)


def _print_changes(path: Path, other: Path | None, task: str, num_listed: int) -> None:
    """Print the change of the reward with its confidence interval, and prompts with worse responses."""
    from deploy.evaluation import answers

    after = answers.read(path / EVALUATION / "after.parquet")
    compared = other or path / EVALUATION / "before.parquet"
    if not compared.exists():
        return
    before = answers.read(compared)
    if task:
        after, before = answers.of_task(after, task), answers.of_task(before, task) or answers.of_task(before, "")
    difference, worse = answers.compare(after, before, str(compared))
    baseline = f"{compared.parent.parent.name}'s" if other else "before PPO"
    print(
        f"reward {difference.mean:+.3f} against {baseline} (95 %: {difference.low:+.3f} to {difference.high:+.3f}, "
        f"p = {difference.p_value:.4f}); worse on {len(worse)} of {len(answers.by_row(after))} prompts"
    )
    View().regressions(worse[:num_listed])
