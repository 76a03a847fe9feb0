"""`antiphon evaluate`: evaluate a run's policy on held-out prompts and compare it with another policy."""

from __future__ import annotations

import re
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

from cluster.errors import InputError
from deploy.commands.arguments import RunOptions, Target, with_run_options
from deploy.commands.policy.selection import Best, Step, require_one_choice, select
from deploy.config.inputs import check_inputs
from deploy.config.schema import RunConfig
from deploy.config.toml import to_toml
from deploy.run.artifacts import is_model_folder, trained_policies
from deploy.run.directory import RunDirectory
from deploy.run.layout import EVALUATION
from deploy.run.open import open_run, read_target, require_run
from deploy.run.stages import not_done, require_stages
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
    policy: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Evaluate this model folder instead of the run's policy.")
    ] = None,
    step: Step = None,
    best: Best = False,
    greedy: Annotated[
        bool, typer.Option("--greedy", help="Also evaluate greedy responses. Evaluates again if changed.")
    ] = False,
    against: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Compare with the policy of this run, prompt by prompt.")
    ] = None,
    before: Annotated[
        bool, typer.Option("--before", help="With --against: compare with its policy before that training.")
    ] = False,
    task: Annotated[str | None, typer.Option(metavar="NAME", help="Show only this task of several.")] = None,
    list_: Annotated[int, typer.Option("--list", min=0, help="How many prompts with worse responses to list.")] = 5,
) -> None:
    """Evaluate a run's policy on held-out prompts, before and after its last training stage.

    With --step, --best or --policy, evaluates that policy alone. Stores the responses in RUN/evaluation. With
    --against, the rewards of the prompts that both answered are compared, a task with the task of the same name in the
    other run, or with a single-task run.

    [dim]antiphon evaluate runs/reviews --num-samples 4 --against runs/hacked[/dim]

    [dim]antiphon evaluate examples/reviews/run.toml --policy my-model[/dim]
    """
    if is_model_folder(target):
        what = "is a model folder, which has no prompts and no scorer"
        raise InputError(str(target), f"{what}: name a run file, and the model with --policy")
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
    one = _single_policy(config, path, policy, step=step, best=best)
    if one is None:
        _evaluate(config, path, shown, fresh=options.fresh, allow_changes=options.allow_changes)
    elif options.fresh:
        raise InputError("--fresh", "would delete the run: leave it out to evaluate a single policy")
    else:
        _evaluate_one(config, path, one, allow_changes=options.allow_changes)
    _print_changes(config, path, one, other, shown, list_)
    print(f"done: {short_path(path)}", file=sys.stderr)


class _Single(NamedTuple):
    """A policy that is evaluated alone, and the name under which its answers are stored."""

    name: str
    folder: Path


def _single_policy(
    config: RunConfig, path: Path, policy: Path | None, *, step: int | None, best: bool
) -> _Single | None:
    """Return the policy that the options choose, or None. Raises InputError if there is no such policy."""
    if policy is not None:
        require_one_choice(step, best, model=policy)
        if not is_model_folder(policy):
            raise InputError("--policy", f"{policy} is no model folder (it has no config.json)")
        return _Single("policy-" + re.sub(r"[^\w-]", "_", policy.resolve().name), policy)
    if step is None and not best:
        return None
    folder = select(config, RunDirectory(path), step=step, best=best).folder
    return _Single("best" if best else f"step-{step}", folder)


def _evaluate_one(config: RunConfig, path: Path, one: _Single, *, allow_changes: bool) -> None:
    """Evaluate a single policy with the prompts and scorers of the run."""
    if config.served().needs_reward_model() and not RunDirectory(path).is_done("reward_model", config):
        raise not_done("reward_model")
    with (
        open_run(config, path, allow_changes=allow_changes) as run,
        running(run),
        View(f"{config.run.name}  {short_path(path)}") as view,
    ):
        from deploy.evaluation.evaluate import evaluate_one
        from deploy.stages.launch import run_function

        run_function(config, run, EVALUATION, partial(evaluate_one, name=one.name, policy=one.folder), view)


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
            stage = trained_policies(config, path).stage
            View().evaluated(summary.get("before", {}), summary["after"], task=task, stage=stage)
            return
        with running(run), View(f"{config.run.name}  {short_path(path)}") as view:
            from deploy.stages.launch import run as launch

            launch(config, run, [EVALUATION], view)


def _print_changes(
    config: RunConfig, path: Path, one: _Single | None, other: Path | None, task: str, num_listed: int
) -> None:
    """Print the change of the reward with its confidence interval, and prompts with worse responses."""
    from deploy.evaluation import answers

    after = answers.read(path / EVALUATION / f"{one.name if one else 'after'}.parquet")
    compared = other or path / EVALUATION / ("after.parquet" if one else "before.parquet")
    if not compared.exists():
        return
    before = answers.read(compared)
    if task:
        after, before = answers.of_task(after, task), answers.of_task(before, task) or answers.of_task(before, "")
    after, before, nums = answers.in_common(after, before, str(compared))
    difference, worse = answers.compare(after, before, str(compared))
    stage = trained_policies(config, path).stage
    baseline = f"{compared.parent.parent.name}'s" if other else "the run's policy" if one else f"before {stage}"
    num = len(answers.by_row(after))
    on_both = f" on the {num} prompts that both answered, of {nums[0]} and {nums[1]}" if nums != (num, num) else ""
    print(
        f"reward {difference.mean:+.3f} against {baseline}{on_both} (95 %: {difference.low:+.3f} to "
        f"{difference.high:+.3f}, p = {difference.p_value:.4f}); worse on {len(worse)} of {num} prompts"
    )
    View().regressions(worse[:num_listed])
