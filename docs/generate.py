"""Writes the generated pages of the docs when mkdocs builds the site: the reference and the names of other trainers.

mkdocs calls `on_files`, `on_page_markdown` and `on_page_content` (hooks). Each other function returns a page, or a part
of one, made of one thing in the code: the command line, the columns of the journal, the metrics, the peers' names.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, cast

from mkdocs.structure.files import File, Files

sys.path[:0] = [os.getcwd(), str(Path(__file__).parent)]

from schema_pages import http_page, openapi, run_file_page, table  # noqa: E402

TRAJECTORY = {
    "uid": "run seed, group and index of the response: `0-88-0`",
    "group": "number of the prompt, from 0",
    "task": "name of its task, or of the run if that names no tasks",
    "token_ids": "the whole conversation, prompt included",
    "mask": "true on tokens that the policy sampled",
    "behavior_logprobs": "log-probability of each sampled token in nats, by the engine; 0 elsewhere",
    "segments": "spans sampled with one version, seed and actor",
    "turns": "responses of the policy, each with its own reward if the environment gave one",
    "reward": "what the scorer gave",
    "reward_parts": "what the reward is made of, by name",
    "scorer_version": "name and digest of the scorer",
    "admission_index": "place in training, from 0",
    "finish_reason": "`stop`, or `length` if it was cut off",
    "step": "the step that trained it",
    "sequence_starts": "starts of sequences after the first: one a turn if `environment.history` is `as_rendered`",
}


def on_files(files: Files, config: Any) -> Files:
    """Add the generated pages. Called by mkdocs."""
    for uri, content in pages().items():
        found = files.get_file_from_path(uri)
        if found is not None:
            files.remove(found)
        files.append(File.generated(config, uri, content=content))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fill in the tables of names and metrics, and read blocks of slow commands as bash. Called by mkdocs."""
    markdown = markdown.replace("```bash slow\n", "```bash\n")
    for mark, made in {"<!-- peer names -->\n": peer_tables, "<!-- metrics -->\n": metrics_table}.items():
        markdown = markdown.replace(mark, made()) if mark in markdown else markdown
    return markdown


def on_page_content(html: str, **_: Any) -> str:
    """Let code in tables break behind dots, slashes, underscores and spaces. Called by mkdocs."""

    def with_breaks(code: re.Match[str]) -> str:
        return re.sub(r"(?<=[./_=\s])(?=\S)", "<wbr>", code[0])

    return re.sub(
        r"<td>.*?</td>", lambda cell: re.sub(r"(?<=<code>)[^<]+", with_breaks, cell[0]), html, flags=re.DOTALL
    )


def pages() -> dict[str, str]:
    """Every generated file of the site by its path."""
    return {
        "reference/run-file.md": run_file_page(),
        "reference/command-line.md": command_line_page(),
        "reference/http.md": http_page(openapi()),
        "reference/openapi.json": json.dumps(openapi(), indent=1),
        "reference/records.md": records_page(),
    }


def command_line_page() -> str:
    """Every command with its arguments and options, from the typer app."""
    import typer.main

    from deploy.cli import app

    group = cast(Any, typer.main.get_command(app))
    text = [f"# Command line\n\n{_plain(group.help)}\n\n{_plain(group.epilog)}\n"]
    text += [
        "`TARGET` is a run file (`RUN.toml`) or a run directory; `RUN` is a run directory. The last line on stderr of a"
        " command that failed is `error: WHERE: WHAT`; [Troubleshooting](../troubleshooting.md) explains it.\n"
    ]
    for name in sorted(group.list_commands(None)):
        command = group.get_command(None, name)
        arguments = [p for p in command.params if p.param_type_name == "argument"]
        options = [p for p in command.params if p.param_type_name == "option"]
        usage = " ".join(["antiphon", name, *(p.metavar or p.name.upper() for p in arguments), "[OPTIONS]"])
        text.append(f"## `{name}`\n\n```text\n{usage}\n```\n\n{_plain(command.help)}\n")
        rows = [[f"`{p.metavar or p.name.upper()}`", _plain(p.help), "required"] for p in arguments]
        rows += [[_option(p), _plain(p.help), _default_of(p)] for p in options]
        text.append(table(["argument or option", "meaning", "default"], rows) if rows else "")
    return "\n".join(text)


def _plain(text: str | None) -> str:
    """Help without rich's markup; an example in [dim] becomes a block of code."""
    lines = (text or "").strip()
    lines = re.sub(r"\[dim\]((?:antiphon|curl) .*?)\[/dim\]", r"\n```text\n\1\n```\n", lines)
    return re.sub(r"\[/?dim\]", "", lines)


def _option(option: Any) -> str:
    names = ", ".join(f"`{name}`" for name in [*option.opts, *option.secondary_opts])
    return names if option.is_flag else f"{names} `{option.metavar or option.name.upper()}`"


def _default_of(option: Any) -> str:
    if option.required:
        return "required"
    if isinstance(option.show_default, str):
        return str(option.show_default)
    return "" if option.default is None or option.is_flag else f"`{option.default}`"


def records_page() -> str:
    """The columns of the journal and of the files of trajectories, from their Arrow schemas."""
    from cluster import trajectory
    from cluster.journal import events

    if set(TRAJECTORY) != set(trajectory.SCHEMA.names):
        raise ValueError("TRAJECTORY in docs/generate.py does not name the columns of cluster/trajectory.py")
    journal = [[f"`{f.name}`", f"`{f.type}`", f.metadata[b"help"].decode()] for f in events.SCHEMA]
    columns = [[f"`{f.name}`", f"`{f.type}`", TRAJECTORY[f.name]] for f in trajectory.SCHEMA]
    kinds = "".join(f"{line}\n" for line in (events.__doc__ or "").splitlines() if line.startswith("|"))
    return (
        "# Journal and trajectories\n\nArrow schemas of what a run writes. [The journal](../concepts/journal.md)"
        " explains what it is for.\n\n## Journal\n\n`RUN/records/` holds `records-NNNNNN.arrows` (Arrow IPC streams,"
        " one checksum a batch) while they are written, and `records-NNNNNN.parquet` once they are closed. One row is"
        f" one event; a column is null if its kind does not use it.\n\n{kinds}\n"
        + table(["column", "type", "meaning"], journal)
        + "\n## Trajectories\n\n`RUN/trajectories/step-NNNNNN.arrow` (Arrow IPC file) holds the trajectories"
        " that a step trained, one a row. `antiphon inspect FILE` shows them. Every per-token list has the same"
        " length.\n\n" + table(["column", "type", "meaning"], columns)
    )


def metrics_table() -> str:
    """Every metric with its unit, from the table that the live view reads too."""
    from cluster.metrics import METRICS

    rows = [[f"`{name}`", metric.unit, metric.help] for name, metric in METRICS.items()]
    return table(["metric", "unit", "meaning"], rows)


def peer_tables() -> str:
    """Our settings, section by section, beside the names that TRL, OpenRLHF and verl have for them."""
    from deploy.config.peer_names import NOT_OFFERED, PEER_NAMES

    sections: dict[str, list[list[str]]] = {}
    for ours, names in PEER_NAMES.items():
        section, _, key = ours.partition(".")
        link = f"[`{key}`](reference/run-file.md#{ours})"
        sections.setdefault(section, []).append([link, "<br>".join(_by_trainer(names))])
    text = [f"### `[{section}]`\n\n{table(['here', 'there'], rows)}" for section, rows in sections.items()]
    missing = table(["there", "here"], [[f"`{name}`", what] for name, what in NOT_OFFERED.items()])
    return "\n".join([*text, f"## What has no counterpart\n\n{missing}"])


def _by_trainer(names: Iterable[str]) -> Iterator[str]:
    """A line for each trainer that has names for a setting, told apart as `deploy.config.peer_names` says."""
    found: dict[str, list[str]] = {"TRL": [], "OpenRLHF": [], "verl": []}
    for name in names:
        trainer = "OpenRLHF" if name.startswith("--") else "verl" if "." in name else "TRL"
        found[trainer].append(f"`{name}`")
    yield from (f"{trainer}: {', '.join(own)}" for trainer, own in found.items() if own)
