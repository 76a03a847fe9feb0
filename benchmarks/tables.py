"""Writes the tables of figures from `benchmarks/results/*.json` into the pages: `python -m benchmarks.tables`.

`examples/README.md` has all figures of each task that chats. `benchmarks/README.md` has every figure with an aim,
`docs/benchmarks.md` those of the main benchmarks whose aim is a number. The results files hold all figures.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.results import FOLDER, ROOT, read
from benchmarks.scale import table as scale_table
from benchmarks.tasks import curve_plot, lag_plot
from benchmarks.tasks.chat import TASKS

DOCS, ALL, EXAMPLES = (ROOT / name for name in ("docs/benchmarks.md", "benchmarks/README.md", "examples/README.md"))
MARKS = re.compile(r"(<!-- figures -->\n).*?(<!-- end -->)", re.DOTALL)
SCALE = re.compile(r"(<!-- scale -->\n).*?(<!-- end -->)", re.DOTALL)
TASK = re.compile(r"(<!-- task (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
LAG = re.compile(r"(<!-- lag -->\n).*?(<!-- end -->)", re.DOTALL)
FOREMOST = ("reviews", "lag_study", "learner", "trl", "reward_http", "learner_gpu")
ORDER = (
    *(
        *FOREMOST,
        "reviews_dpo",
        "engine_gpu",
        "letters",
        "estimators",
        "speed",
        "whole_run",
        "start_up",
        "many_prompts",
    ),
    *("recorder", "scale", "environments", *TASKS),
)


def table(names: Sequence[str]) -> str:
    """Returns the figures of these benchmarks that have an aim as Markdown, with the machines they were measured on."""
    lines = ["| figure: median (range) | measured | aim |", "|---|---|---|"]
    origins: dict[str, list[str]] = {}
    for name in names:
        if not (FOLDER / f"{name}.json").exists():
            origins.setdefault("Not measured yet", []).append(f"`{name}`")
            continue
        record, rows = read(name)
        shown = [row for row in rows if row.aim and (names is ORDER or row.aim[0] in "<>")]
        lines += [f"| {row.figure} | {row.measured()} | {row.aim} |" for row in shown]
        origins.setdefault(f"Measured on {_machine(record)}", []).append(_origin(name, record))
    below = [f"{machine}: {'; '.join(measured)}." for machine, measured in origins.items()]
    return "\n\n".join(["\n".join(lines), *below]) + "\n"


def _machine(record: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{package} {version}" for package, version in record["versions"].items())
    return f"{record['machine']}, {versions}"


def _origin(name: str, record: Mapping[str, Any]) -> str:
    seeds = ", ".join(map(str, record["seeds"]))
    return f"`{name}` on {record['date']}, commit {record['commit']}, seeds {seeds}"


def task_table(name: str) -> str:
    """Returns all figures of a task as Markdown, with the machine they were measured on."""
    if not (FOLDER / f"{name}.json").exists():
        return "Not measured yet.\n"
    record, rows = read(name)
    lines = [f"| {row.figure} | {row.measured()} | {row.aim} |" for row in rows]
    origin = f"Measured on {_machine(record)}: {_origin(name, record)}."
    return "\n".join(["| figure | measured | aim |", "|---|---|---|", *lines, "", origin]) + "\n"


def filled(text: str, names: Sequence[str] = FOREMOST) -> str:
    """Returns the text with the tables between its markers written again."""
    text = MARKS.sub(lambda match: match[1] + table(names) + match[2], text)
    text = TASK.sub(lambda match: match[1] + task_table(match[2]) + match[3], text)
    if (FOLDER / "lag_study.json").exists():
        text = LAG.sub(lambda match: match[1] + "\n".join(lag_plot.table()) + "\n" + match[2], text)
    if (FOLDER / "scale.json").exists():
        text = SCALE.sub(lambda match: match[1] + "\n".join(scale_table.section()) + "\n" + match[2], text)
    return text


if __name__ == "__main__":
    DOCS.write_text(filled(DOCS.read_text()))
    ALL.write_text(filled(ALL.read_text(), ORDER))
    EXAMPLES.write_text(filled(EXAMPLES.read_text()))
    if (FOLDER / "lag_study.json").exists():
        lag_plot.draw()
        curve_plot.draw_all()
