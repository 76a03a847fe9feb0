"""The tables of figures, from `benchmarks/results/*.json`: `python -m benchmarks.tables` writes them in place.

`benchmarks/README.md` has every figure with an aim, the README those of the foremost benchmarks whose aim is a number;
the results files hold the others too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import lag_plot, scale_table
from benchmarks.results import FOLDER, read

README, ALL = Path(__file__).parent.parent / "README.md", Path(__file__).parent / "README.md"
MARKS = re.compile(r"(<!-- figures -->\n).*?(<!-- end -->)", re.DOTALL)
SCALE = re.compile(r"(<!-- scale -->\n).*?(<!-- end -->)", re.DOTALL)
LAG = re.compile(r"(<!-- lag -->\n).*?(<!-- end -->)", re.DOTALL)
FOREMOST = ("reviews", "lag_study", "learner", "trl", "reward_http")
ORDER = (
    *FOREMOST,
    "learner_gpu",
    "letters",
    "estimators",
    "speed",
    "whole_run",
    "start_up",
    "recorder",
    "scale",
    "environments",
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


def filled(text: str, names: Sequence[str] = FOREMOST) -> str:
    """A text with its tables made anew."""
    text = MARKS.sub(lambda match: match[1] + table(names) + match[2], text)
    if (FOLDER / "lag_study.json").exists():
        text = LAG.sub(lambda match: match[1] + "\n".join(lag_plot.table()) + "\n" + match[2], text)
    if (FOLDER / "scale.json").exists():
        text = SCALE.sub(lambda match: match[1] + "\n".join(scale_table.section()) + "\n" + match[2], text)
    return text


if __name__ == "__main__":
    README.write_text(filled(README.read_text()))
    ALL.write_text(filled(ALL.read_text(), ORDER))
    if (FOLDER / "lag_study.json").exists():
        lag_plot.draw()
