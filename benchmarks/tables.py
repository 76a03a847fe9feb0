"""The tables of figures, from `benchmarks/results/*.json`: `python -m benchmarks.tables` writes them in place.

`examples/README.md` has all figures of each task that chats.
`benchmarks/README.md` has every figure with an aim, the README those of the foremost benchmarks whose aim is a number;
the results files hold the others too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.results import FOLDER, ROOT, read
from benchmarks.scale import table as scale_table
from benchmarks.tasks import lag_plot
from benchmarks.tasks.chat import TASKS

README, ALL, EXAMPLES = ROOT / "README.md", ROOT / "benchmarks" / "README.md", ROOT / "examples" / "README.md"
MARKS = re.compile(r"(<!-- figures -->\n).*?(<!-- end -->)", re.DOTALL)
SCALE = re.compile(r"(<!-- scale -->\n).*?(<!-- end -->)", re.DOTALL)
TASK = re.compile(r"(<!-- task (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
LAG = re.compile(r"(<!-- lag -->\n).*?(<!-- end -->)", re.DOTALL)
FOREMOST = ("reviews", "lag_study", "learner", "trl", "reward_http")
ORDER = (
    *(*FOREMOST, "learner_gpu", "engine_gpu", "letters", "estimators", "speed", "whole_run", "start_up"),
    *("recorder", "scale", "environments", *TASKS),
)


def table(names: Sequence[str]) -> str:
    """Every measured figure of these that has an aim, and below what each benchmark was measured on."""
    lines, origins = ["| figure: median (range) | measured | aim |", "|---|---|---|"], []
    for name in names:
        if not (FOLDER / f"{name}.json").exists():
            origins.append(f"`{name}`: not measured yet")
            continue
        record, rows = read(name)
        shown = [row for row in rows if row.aim and (names is ORDER or row.aim[0] in "<>")]
        lines += [f"| {row.figure} | {row.measured()} | {row.aim} |" for row in shown]
        origins.append(_origin(name, record))
    return "\n".join([*lines, "", "; ".join(origins) + "."]) + "\n"


def _origin(name: str, record: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{package} {version}" for package, version in record["versions"].items())
    seeds = ", ".join(map(str, record["seeds"]))
    return f"`{name}`: {record['date']}, commit {record['commit']}, seeds {seeds}, {record['machine']}, {versions}"


def task_table(name: str) -> str:
    """Every measured figure of a task, and below what it was measured on."""
    if not (FOLDER / f"{name}.json").exists():
        return "Not measured yet.\n"
    record, rows = read(name)
    lines = [f"| {row.figure} | {row.measured()} | {row.aim} |" for row in rows]
    return "\n".join(["| figure | measured | aim |", "|---|---|---|", *lines, "", _origin(name, record) + "."]) + "\n"


def filled(text: str, names: Sequence[str] = FOREMOST) -> str:
    """A text with its tables made anew."""
    text = MARKS.sub(lambda match: match[1] + table(names) + match[2], text)
    text = TASK.sub(lambda match: match[1] + task_table(match[2]) + match[3], text)
    if (FOLDER / "lag_study.json").exists():
        text = LAG.sub(lambda match: match[1] + "\n".join(lag_plot.table()) + "\n" + match[2], text)
    if (FOLDER / "scale.json").exists():
        text = SCALE.sub(lambda match: match[1] + "\n".join(scale_table.section()) + "\n" + match[2], text)
    return text


if __name__ == "__main__":
    README.write_text(filled(README.read_text()))
    ALL.write_text(filled(ALL.read_text(), ORDER))
    EXAMPLES.write_text(filled(EXAMPLES.read_text()))
    if (FOLDER / "lag_study.json").exists():
        lag_plot.draw()
