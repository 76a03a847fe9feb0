"""The command line: loads commands on demand, prints errors and returns exit codes.

A command is imported only when it runs or when its help is printed, and imports torch and ray only when it needs them,
so that `antiphon check` and `antiphon --help` answer in about a second.
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
import traceback
from importlib import metadata
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from cluster.errors import AntiphonError, InputError
from deploy.run.stages import STAGES

COMMANDS = {
    "Set up": {
        "new": "setup.new:new",
        "check": "setup.check:check",
        "config": "setup.config:config",
    },
    "Train": {
        "train": "training.train:train",
        "submit": "training.submit:submit",
        "scale": "training.scale:scale",
    },
    "Use and evaluate the policy": {
        "evaluate": "policy.evaluate:evaluate",
        "chat": "policy.chat:chat",
        "play": "policy.play:play",
        "export": "policy.export:export",
    },
    "Understand a run": {
        "inspect": "history.inspect:inspect",
        "explain": "history.explain:explain",
        "replay": "history.replay:replay",
    },
    "Rewards and human feedback": {
        "serve-rewards": "rewards.serve_rewards:serve_rewards",
        "evaluate-rewards": "rewards.evaluate_rewards:evaluate_rewards",
        "label": "rewards.label:label",
        "token": "rewards.token:token",
    },
}
"""Commands by the heading in the help: name, and module in deploy.commands with function.

The commands of single stages are in `deploy.run.stages.STAGES`.
"""
STAGE_COMMANDS = {stage.command: stage for stage in STAGES.values() if stage.help is not None}


class LazyCommands(TyperGroup):
    """Imports a command's module only when the command is used or listed."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names of all commands in the order of the help."""
        return [*(name for commands in COMMANDS.values() for name in commands), *STAGE_COMMANDS]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return the command with this name, or None."""
        if cmd_name not in self.commands and cmd_name in self.list_commands(ctx):
            self.commands[cmd_name] = _load(cmd_name)
        return self.commands.get(cmd_name)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Resolve the command; loads all of them if the name is unknown, so that similar names are suggested."""
        if self.get_command(ctx, args[0]) is None:
            for name in self.list_commands(ctx):
                self.get_command(ctx, name)
        return super().resolve_command(ctx, args)


def _load(name: str) -> Any:
    """Import a command's function and return its click command."""
    if name in STAGE_COMMANDS:
        from deploy.commands.training.train import stage_command

        function, heading = stage_command(STAGE_COMMANDS[name]), "Run one stage"
    else:
        heading = next(heading for heading, commands in COMMANDS.items() if name in commands)
        module, _, attribute = COMMANDS[heading][name].partition(":")
        function = getattr(importlib.import_module(f"deploy.commands.{module}"), attribute)
    single = typer.Typer(add_completion=False, rich_markup_mode="rich")
    text = "\n\n".join(" ".join(part.split()) for part in (inspect.getdoc(function) or "").split("\n\n"))
    single.command(name, help=text, rich_help_panel=heading)(function)
    return typer.main.get_command(single)


class CommandLine(typer.Typer):
    """Runs the app; prints a failure as the last line, `error: WHERE: WHAT`, and exits with a code."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        sys.exit(self._exit_code(*args, **kwargs))

    def _exit_code(self, *args: Any, **kwargs: Any) -> int:
        try:
            code = super().__call__(*args, prog_name="antiphon", standalone_mode=False, **kwargs)
            return code if isinstance(code, int) else 0
        except AntiphonError as error:
            return _print_error(error)
        except typer.TyperException as error:
            return _print_error(InputError("antiphon", f"{error.format_message().rstrip('.')} (see antiphon --help)"))
        except (KeyboardInterrupt, typer.Abort):
            return 130
        except BrokenPipeError:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (the interpreter flushes it at exit; the pipe is closed)
            return 1
        except Exception as error:  # noqa: BLE001 (last boundary: prints the traceback of an unexpected error)
            from deploy.runtime.status import type_and_first_line

            traceback.print_exc()
            return _print_error(AntiphonError("antiphon", type_and_first_line(error)))


def _print_error(error: AntiphonError) -> int:
    from deploy.runtime.status import say_error

    return say_error(error)


app = CommandLine(
    cls=LazyCommands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Asynchronous reinforcement learning from human feedback on Ray.\n\n"
    "[dim]Start with:[/dim] antiphon new my_task --from reviews",
    epilog="Exit codes: 0 success, 1 failure, 2 bad input, 130 interrupted (the same command resumes the run).",
)


def _print_version(value: bool) -> None:
    if value:
        print(f"antiphon {metadata.version('antiphon')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    from deploy.runtime.host import prepare_host

    prepare_host()


if __name__ == "__main__":
    app()
