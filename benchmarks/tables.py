"""The README's table of figures, from `benchmarks/results/*.json`: `python -m benchmarks.tables` writes it in place.

Only figures with an aim are shown; the results files hold the others too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.results import FOLDER, read

README = Path(__file__).parent.parent / "README.md"
MARKS = re.compile(r"(<!-- figures -->\n).*?(<!-- end -->)", re.DOTALL)
ORDER = ("reviews", "letters", "speed", "whole_run", "start_up", "trl")


def table() -> str:
    """Every measured figure that has an aim, and below what each benchmark was measured on."""
    lines, origins = ["| figure: median (range) | measured | aim |", "|---|---|---|"], []
    for name in ORDER:
        if not (FOLDER / f"{name}.json").exists():
            origins.append(f"`{name}`: not measured yet")
            continue
        record, rows = read(name)
        lines += [f"| {row.figure} | {row.measured()} | {row.aim} |" for row in rows if row.aim]
        origins.append(_origin(name, record))
    return "\n".join([*lines, "", "; ".join(origins) + "."]) + "\n"


def _origin(name: str, record: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{package} {version}" for package, version in record["versions"].items())
    seeds = ", ".join(map(str, record["seeds"]))
    return f"`{name}`: {record['date']}, commit {record['commit']}, seeds {seeds}, {record['machine']}, {versions}"


def filled(text: str) -> str:
    """The README with its table made anew."""
    return MARKS.sub(lambda match: match[1] + table() + match[2], text)


if __name__ == "__main__":
    README.write_text(filled(README.read_text()))
