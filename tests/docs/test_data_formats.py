"""Test the examples of the guide on data formats: each row becomes what its line says."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import cast

import pytest

from cluster.data.datasets import Kind, read_examples

GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "data-formats.md"
LINE = re.compile(r"^\| `(sft|prompts|preferences)` \| `(\{.*?\})` \| `(\{.*?\})` \|$", re.MULTILINE)
EXAMPLES = LINE.findall(GUIDE.read_text(encoding="utf-8"))


@pytest.mark.parametrize(("kind", "row", "made"), EXAMPLES)
def test_a_row_of_the_guide_becomes_what_its_line_says(tmp_path: Path, kind: str, row: str, made: str) -> None:
    (tmp_path / "set.jsonl").write_text(row + "\n", encoding="utf-8")
    others = ("tools", "references", "margin")
    columns = read_examples(tmp_path / "set.jsonl", cast(Kind, kind), others=others, paired=False).columns
    assert {name: values[0] for name, values in columns.items()} == json.loads(made)


def test_the_guide_has_an_example_of_each_kind() -> None:
    assert {kind for kind, _, _ in EXAMPLES} == {"sft", "prompts", "preferences"}
    assert len(EXAMPLES) >= 12
