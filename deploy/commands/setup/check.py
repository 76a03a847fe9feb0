"""`antiphon check`: validate a run file and the files that it names. Imports neither torch nor ray."""

from __future__ import annotations

from deploy.commands.arguments import Lines, RunFile
from deploy.config.inputs import check_inputs
from deploy.run.directory import RunDirectory
from deploy.run.open import read_target, require_same_inputs, require_same_settings
from deploy.terminal.text import short_path


def check(run_file: RunFile, set_: Lines = None) -> None:
    """Check a run file and the files that it names, without starting anything.

    [dim]antiphon check examples/reviews/run.toml[/dim]
    """
    config, path = read_target(run_file, set_ or ())
    lines = check_inputs(config)
    require_same_settings(config, path)
    require_same_inputs(config, RunDirectory(path))
    print(
        "\n".join([*lines, f"{'stages':<12} {', '.join(config.run.stages)}", f"{'run':<12} {short_path(path)}", "ok"])
    )
