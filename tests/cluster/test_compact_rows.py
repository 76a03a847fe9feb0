"""Compact rows are the rows they were made of, in little memory, also behind a pickle."""

from __future__ import annotations

import datetime
import math
import pickle
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from cluster.compact_rows import CompactRows

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda each: st.lists(each, max_size=3) | st.dictionaries(st.text(), each, max_size=3),
    max_leaves=6,
)


@given(st.lists(st.dictionaries(st.text(), PLAIN, max_size=3), max_size=4))
def test_rows_are_given_back_as_they_were(rows: list[dict[str, Any]]) -> None:
    compact = CompactRows.of(rows)
    assert compact == rows
    assert [compact[i - len(rows)] for i in range(len(rows))] == rows
    assert compact[1:3] == rows[1:3]


def test_rows_that_json_would_change_are_kept_as_objects() -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": "a", "day": datetime.date(2026, 1, 2)},
        {"p": (1, 2)},
        {"p": "\ud800"},
        {"p": {1: 2}},
        {"p": b"x"},
    ]
    compact = CompactRows.of(rows)
    assert list(compact) == rows
    assert len(compact.others) == len(rows)
    assert type(compact[1]["p"]) is tuple
    assert math.isnan(CompactRows.of([{"p": math.nan}])[0]["p"])


def test_rows_travel_without_being_unpacked() -> None:
    rows = [{"prompt": "x" * 200, "n": i} for i in range(1000)]
    buffers: list[pickle.PickleBuffer] = []
    stream = pickle.dumps(CompactRows.of(rows), protocol=5, buffer_callback=buffers.append)
    assert len(stream) < 2000
    assert pickle.loads(stream, buffers=buffers) == rows  # noqa: S301
