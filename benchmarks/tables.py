"""The README's tables, made from `benchmarks/results/*.json`: `python -m benchmarks.tables` writes them in place."""

from __future__ import annotations

import re
from pathlib import Path

from benchmarks.results import FOLDER, read

README = Path(__file__).parent.parent / "README.md"
MARKS = re.compile(r"(<!-- table: (?P<name>\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def table(name: str) -> str:
    """One results file as a Markdown table, with what it was measured on below."""
    record, rows = read(name)
    lines = ["| figure | measured | aim |", "|---|---|---|"]
    lines += [f"| {row.figure}{f' ({row.note})' if row.note else ''} | {row.measured()} | {row.aim} |" for row in rows]
    origin = f"`{record['command']}`, {record['date']}, commit {record['commit']}, {record['machine']}"
    return "\n".join([*lines, "", origin]) + "\n"


def filled(text: str) -> str:
    """The README with every marked table made anew; a table without results says so."""

    def fill(match: re.Match[str]) -> str:
        name = match["name"]
        body = table(name) if (FOLDER / f"{name}.json").exists() else "Not measured yet.\n"
        return match[1] + body + match[3]

    return MARKS.sub(fill, text)


if __name__ == "__main__":
    README.write_text(filled(README.read_text()))
