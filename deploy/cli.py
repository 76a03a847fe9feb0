"""The command line: every command, what it prints, its exit code and the last line on stderr.

Reads settings and opens run directories; the work is done elsewhere and imported only when it is asked for, so that
`antiphon check` and `--help` answer at once.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from cluster.errors import AntiphonError, InputError
from cluster.files import replacing_folder
from deploy.commands.arguments import DryRun, Fresh, Lines, Name, Run, RunFile, RunsDir, Target
from deploy.commands.evaluate import commands as evaluate_commands
from deploy.commands.rewards import commands as reward_commands
from deploy.config.inputs import check_inputs
from deploy.config.schema import RunConfig
from deploy.config.toml import to_toml
from deploy.run.directory import RunDirectory
from deploy.run.open import open_run, read_target, require_run, require_same_settings
from deploy.run.stages import STAGES, not_done, require_stages
from deploy.runtime.connect import use_own_token
from deploy.runtime.status import first_line, running, say_error
from deploy.terminal.view import View


class CommandLine(typer.Typer):
    """A typer app whose every end is an exit code and, when it failed, a last line `error: WHERE: WHAT`."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        sys.exit(self._exit_code(*args, **kwargs))

    def _exit_code(self, *args: Any, **kwargs: Any) -> int:
        try:
            code = super().__call__(*args, prog_name="antiphon", standalone_mode=False, **kwargs)
            return code if isinstance(code, int) else 0
        except AntiphonError as error:
            return say_error(error)
        except typer.TyperException as error:
            return say_error(InputError("antiphon", f"{error.format_message().rstrip('.')} (see antiphon --help)"))
        except (KeyboardInterrupt, typer.Abort):
            return 130
        except BrokenPipeError:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (nobody reads; the interpreter flushes it at exit)
            return 1
        except Exception as error:  # noqa: BLE001 (the last boundary: a fault of ours is shown whole)
            traceback.print_exc()
            return say_error(AntiphonError("antiphon", first_line(error)))


app = CommandLine(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Reinforcement learning from human feedback, asynchronous, on Ray.\n\n"
    "[dim]Start with:[/dim] antiphon train examples/reviews/run.toml",
    epilog="Exit codes: 0 all done, 1 failed, 2 bad input, 130 interrupted (the same command goes on).",
)


@app.command()
def train(
    target: Target,
    set_: Lines = None,
    runs_dir: RunsDir = None,
    name: Name = None,
    fresh: Fresh = False,
    dry_run: DryRun = False,
) -> None:
    """Do every stage of a run that is not done yet.

    [dim]antiphon train examples/reviews/run.toml --set 'learner.num_steps = 20' --name short[/dim]
    """
    _stages(target, set_, runs_dir, name, fresh, dry_run, stages=None)


def _stage_command(command: str, stage: str, text: str) -> None:
    def run(
        target: Target,
        set_: Lines = None,
        runs_dir: RunsDir = None,
        name: Name = None,
        fresh: Fresh = False,
        dry_run: DryRun = False,
    ) -> None:
        _stages(target, set_, runs_dir, name, fresh, dry_run, stages=[stage])

    app.command(command, help=f"{text}\n\n[dim]antiphon {command} examples/reviews/run.toml[/dim]")(run)


for _stage in STAGES.values():
    if _stage.help is not None:
        _stage_command(_stage.command, _stage.name, _stage.help)


def _stages(
    target: Path,
    lines: Sequence[str] | None,
    runs_dir: Path | None,
    name: str | None,
    fresh: bool,
    dry_run: bool,
    *,
    stages: list[str] | None,
) -> None:
    config, path = read_target(target, lines or (), name=name, runs_dir=runs_dir)
    if dry_run:
        print(to_toml(config), end="")
        return
    wanted = stages or list(config.run.stages)
    check_inputs(config)
    if wanted == ["reward_model"] and target.is_dir():
        _train_again(config, path, fresh=fresh)
        return
    require_stages(config, None if fresh else RunDirectory(path), wanted)
    with open_run(config, path, fresh=fresh) as run:
        if all(run.is_done(stage, config) for stage in wanted):
            _say_done(run, wanted)
            return
        with running(run), View(f"{config.run.name}  {_short(path)}") as view:
            from deploy.stages.launch import run as launch

            launch(config, run, wanted, view)
    print(f"done: {_short(path)}", file=sys.stderr)


def _train_again(config: RunConfig, path: Path, *, fresh: bool) -> None:
    """Train a run's reward model again; its own settings may differ from those before."""
    if fresh:
        raise InputError("--fresh", f"would delete the run; without it the reward model of {path} is trained again")
    from deploy.stages.reward_model import retrain

    for port in retrain(config, path, View(f"{config.run.name}  {_short(path)}")):
        print(f"published to the reward service on port {port}", file=sys.stderr)
    print(f"done: {_short(path)}", file=sys.stderr)


def _say_done(run: RunDirectory, stages: Sequence[str]) -> None:
    run.update_status(state="DONE", ray_address=None, error=None)
    if "evaluation" in stages:
        evaluation = run.summary()["evaluation"]
        View().evaluated(evaluation.get("before", {}), evaluation["after"])
    print(f"{', '.join(stages)}: done already in {_short(run.path)} (--fresh starts over)", file=sys.stderr)


def _short(path: Path) -> str:
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


@app.command()
def check(run_file: RunFile, set_: Lines = None) -> None:
    """Say what is wrong with a run file, in a second or two and without starting anything."""
    config, path = read_target(run_file, set_ or ())
    lines = check_inputs(config)
    require_same_settings(config, path)
    print("\n".join([*lines, f"{'stages':<12} {', '.join(config.run.stages)}", f"{'run':<12} {_short(path)}", "ok"]))


@app.command()
def submit(
    run_file: RunFile,
    address: Annotated[str, typer.Option(help="Ray's dashboard, such as http://127.0.0.1:8265.")],
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Follow the job's log to its end.")] = True,
    set_: Lines = None,
    runs_dir: RunsDir = None,
    name: Name = None,
    fresh: Fresh = False,
    dry_run: DryRun = False,
) -> None:
    """Train as a job on a Ray cluster, follow its log and end with its exit code.

    The working directory travels, without .venv, .git and runs. Beyond this machine, --runs-dir must be an absolute
    folder on storage that outlives the cluster's nodes.

    [dim]antiphon submit examples/reviews/run.toml --address http://127.0.0.1:8265[/dim]
    """
    if run_file.is_dir():
        raise InputError(str(run_file), "a run directory does not travel; submit its run file")
    config, _ = read_target(run_file, set_ or (), name=name, runs_dir=runs_dir)
    if dry_run:
        print(to_toml(config), end="")
        return
    from deploy.commands import submit as jobs

    kept = jobs.kept_where(config, address)
    if jobs.is_local(address):
        check_inputs(config)
    options = [part for line in set_ or () for part in ("--set", line)] + ["--name", config.run.name]
    options += ["--fresh"] if fresh else []
    code = jobs.submit(config, run_file, options, address=address, runs_dir=kept, wait=wait)
    raise typer.Exit(code)


@app.command()
def scale(run: Run, rollout_actors: Annotated[int, typer.Option(min=1, help="How many should sample.")]) -> None:
    """Change the number of rollout actors while a run goes on.

    [dim]antiphon scale runs/reviews --rollout-actors 3[/dim]
    """
    use_own_token()
    from deploy.commands.scale import scale as ask

    before = ask(run, rollout_actors)
    print(f"rollout actors: {before} -> {rollout_actors}")


@app.command()
def chat(
    run: Run, prompt: Annotated[str | None, typer.Option(help="One prompt; without it, type them.")] = None
) -> None:
    """Talk to the policy of a run.

    [dim]antiphon chat runs/reviews --prompt 'the food'[/dim]
    """
    directory = require_run(run)
    from deploy.commands.chat import chat as talk

    talk(directory, prompt)


@app.command()
def play(
    target: Target,
    seed: Annotated[int, typer.Option(min=0, help="Given to the environment; of prompts, the row in this place.")] = 0,
    task: Annotated[str | None, typer.Option(metavar="NAME", help="In this task, of several with one.")] = None,
    set_: Lines = None,
) -> None:
    """Be the policy: answer a task's environment turn by turn, or let lines on stdin do it.

    [dim]antiphon play examples/game/run.toml --seed 3[/dim]
    """
    config, path = read_target(target, set_ or ())
    from deploy.commands.play import play as hold

    hold(config, path, task=task, seed=seed)


@app.command()
def replay(
    run: Run,
    steps: Annotated[str | None, typer.Option(metavar="A:B", help="These alone, from the checkpoint before.")] = None,
    tokens: Annotated[bool, typer.Option("--tokens", help="Sample every segment again as well.")] = False,
    what_if: Annotated[
        list[str] | None, typer.Option(metavar="LINE", help="Train with another learner setting; a line of TOML.")
    ] = None,
) -> None:
    """Train what a run has recorded again and compare every version, bit for bit.

    The first step that differs is named and ends the command with 1. Other settings are no replay: their curves are
    shown beside the recorded ones.

    [dim]antiphon replay runs/letters --what-if 'learner.clip = 0.1'[/dim]
    """
    directory = require_run(run)
    from deploy.commands.replay import replay as again

    again(directory, steps=steps, what_if=what_if or (), tokens=tokens)


@app.command()
def explain(
    run: Run,
    uid: Annotated[str, typer.Argument(metavar="UID", help="Of a conversation that was trained; inspect lists them.")],
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write it as a page as well.")] = None,
) -> None:
    """Tell one conversation turn by turn: text, rewards, and what its step made of every token.

    The step is trained again from the nearest checkpoint, in this process: values and advantages are those of training.

    [dim]antiphon explain runs/reviews 0-88-0 --html why.html[/dim]
    """
    directory = require_run(run)
    from deploy.commands.explain import explain as tell

    tell(directory, uid, html=html)


app.add_typer(reward_commands)
app.add_typer(evaluate_commands)


@app.command()
def inspect(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="From RUN/trajectories or RUN/failed.")],
    uid: Annotated[str | None, typer.Option(help="Show this trajectory whole.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="How many trajectories to list.")] = 20,
) -> None:
    """Look into a file of trajectories; what is not finite is marked.

    [dim]antiphon inspect runs/reviews/trajectories/step-000012.arrow --uid 0-88-0[/dim]
    """
    from deploy.commands.inspect import inspect as show

    show(file, uid=uid, limit=limit)


@app.command()
def export(run: Run, output: Annotated[Path, typer.Option(help="Where to; it may not exist yet.")]) -> None:
    """Copy a run's policy, an ordinary Hugging Face folder.

    [dim]antiphon export runs/reviews --output my-model[/dim]
    """
    policy = require_run(run).path / "policy"
    if not (policy / "config.json").exists():
        raise not_done("ppo")
    if output.exists():
        raise InputError(str(output), "exists already")
    try:
        with replacing_folder(output) as partial:
            shutil.copytree(policy, partial, dirs_exist_ok=True)
    except OSError as error:
        raise InputError(str(output), f"cannot be written ({error.strerror or error})") from error
    size = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
    model = json.loads((output / "config.json").read_text())
    print(f"{output}: {(model.get('architectures') or ['model'])[0]}, {size / 2**20:.1f} MiB")


if __name__ == "__main__":
    app()
