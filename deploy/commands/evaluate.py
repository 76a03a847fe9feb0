"""The command that judges a policy, again and otherwise where it is asked to, and against another run's.

As in `deploy.cli`, the work is imported only when it is asked for.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from cluster.errors import InputError
from deploy.commands.arguments import DryRun, Fresh, Lines, Name, RunsDir, Target
from deploy.config.inputs import check_inputs
from deploy.config.schema import RunConfig
from deploy.config.toml import to_toml
from deploy.run.directory import RunDirectory
from deploy.run.layout import EVALUATION
from deploy.run.open import open_run, read_target, require_run
from deploy.run.stages import require_stages
from deploy.runtime.status import running
from deploy.terminal.view import View

commands = typer.Typer()


@commands.command()
def evaluate(
    target: Target,
    num_samples: Annotated[
        int | None, typer.Option(min=1, metavar="K", help="Answers to each prompt, judged again.")
    ] = None,
    greedy: Annotated[bool, typer.Option("--greedy", help="Take the likeliest answers too, judged again.")] = False,
    against: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Compare with that run's policy, prompt by prompt.")
    ] = None,
    before: Annotated[bool, typer.Option("--before", help="With --against: with its policy before PPO.")] = False,
    task: Annotated[str | None, typer.Option(metavar="NAME", help="Show this one of several tasks alone.")] = None,
    list_: Annotated[int, typer.Option("--list", min=0, help="Prompts to list whose answers are worse.")] = 5,
    set_: Lines = None,
    runs_dir: RunsDir = None,
    name: Name = None,
    fresh: Fresh = False,
    dry_run: DryRun = False,
) -> None:
    """Judge the policy before and after PPO on held-out prompts; what was answered is kept in RUN/evaluation.

    A task of a run of several is compared with that task of another run, or with a run of that task alone.

    [dim]antiphon evaluate runs/reviews --num-samples 4 --against runs/hacked[/dim]
    """
    lines = [f"evaluation.num_samples = {num_samples}"] if num_samples is not None else []
    lines += ["evaluation.greedy = true"] if greedy else []
    config, path = read_target(target, [*(set_ or ()), *lines], name=name, runs_dir=runs_dir)
    if dry_run:
        print(to_toml(config), end="")
        return
    other = require_run(against).path / EVALUATION / f"{'before' if before else 'after'}.parquet" if against else None
    if other is not None and not other.exists():
        raise InputError(str(against), "its answers are not kept (run antiphon evaluate on it)")
    check_inputs(config)
    shown = _task_shown(config, task)
    _evaluate(config, path, shown, fresh=fresh)
    _say_changes(path, other, shown, list_)
    print(f"done: {os.path.relpath(path)}", file=sys.stderr)


def _task_shown(config: RunConfig, task: str | None) -> str:
    """The task that is shown alone, '' where all are. Raises InputError naming those there are."""
    names = {config.recorded_as(name): name for name in config.by_task()}
    if task is not None and task not in names:
        raise InputError("--task", f"no task {task!r}; there is {', '.join(names)}")
    return names[task] if task is not None else ""


def _evaluate(config: RunConfig, path: Path, task: str, *, fresh: bool) -> None:
    """Judge the run's policies, unless that was done as it is asked for now."""
    require_stages(config, None if fresh else RunDirectory(path), [EVALUATION])
    with open_run(config, path, fresh=fresh) as run:
        if run.is_done(EVALUATION, config):
            summary = run.summary()[EVALUATION]
            run.update_status(state="DONE", ray_address=None, error=None)
            View().evaluated(summary.get("before", {}), summary["after"], task=task)
            return
        with running(run), View(f"{config.run.name}  {os.path.relpath(path)}") as view:
            from deploy.stages.launch import run as launch

            launch(config, run, [EVALUATION], view)


def _say_changes(path: Path, other: Path | None, task: str, num_listed: int) -> None:
    """What changed, in words with how sure that is, and the prompts where it is for the worse."""
    from deploy.evaluation import answers

    after = answers.read(path / EVALUATION / "after.parquet")
    compared = other or path / EVALUATION / "before.parquet"
    if not compared.exists():
        return
    before = answers.read(compared)
    if task:
        after, before = answers.of_task(after, task), answers.of_task(before, task) or answers.of_task(before, "")
    difference, worse = answers.compared(after, before, str(compared))
    than = f"{compared.parent.parent.name}'s" if other else "before PPO"
    print(
        f"reward {difference.mean:+.3f} against {than} (95 %: {difference.low:+.3f} to {difference.high:+.3f}, "
        f"p = {difference.p_value:.4f}); worse on {len(worse)} of {len(answers.by_row(after))} prompts"
    )
    View().regressions(worse[:num_listed])
