"""Test reading rows as they are: formats, compressions, own keys of each row, and damaged files."""

from __future__ import annotations

import bz2
import datetime
import decimal
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.data.datasets import describe, read_examples
from cluster.data.invalid_rows import BrokenRows
from cluster.errors import InputError
from tests.support.chat import user

Rows = list[dict[str, Any]]
CALLS: Rows = [
    {"prompt": [user("a")], "extra_info": {"x": 1, "nothing": None}, "tests": [{"in": 1}, {"out": [2, None]}]},
    {"prompt": [{**user("b"), "name": "Ann"}], "extra_info": {"y": {"z": "1"}}, "tests": []},
    {
        "prompt": [
            user("c"),
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}},
                    {"type": "function", "function": {"name": "g", "arguments": {"y": [{"p": 1}, {"q": "2"}]}}},
                ],
            },
            {"role": "tool", "name": "f", "content": "1"},
        ],
        "extra_info": None,
        "tests": [1, "2"],
    },
]
"""Rows whose nested columns have other keys and types in each row."""


def zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return bytes(sink.getvalue())


COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstd,
}


def lines(rows: Rows) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def read(path: Path, broken: BrokenRows | None = None) -> Rows:
    columns = read_examples(path, "prompts", others=None, broken=broken).columns
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("name", ["set.jsonl", "set.json", "set.ndjson", "lines.json", "pretty.json", "wrapped.json"])
def test_each_row_of_a_text_file_keeps_its_own_keys(tmp_path: Path, name: str, compression: str) -> None:
    contents = {
        "set.json": json.dumps(CALLS).encode(),
        "pretty.json": json.dumps(CALLS, indent=2).encode(),
        "wrapped.json": json.dumps({"data": CALLS}).encode(),
    }
    path = tmp_path / f"{name}{compression}"
    path.write_bytes(COMPRESSIONS[compression](contents.get(name, lines(CALLS))))
    assert read(path) == CALLS
    assert describe(path, "prompts").num_rows == len(CALLS)


def write_arrow_file(path: Path, table: pa.Table) -> None:
    with pa.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table)


def write_arrow_stream(path: Path, table: pa.Table) -> None:
    with pa.ipc.new_stream(str(path), table.schema) as writer:
        writer.write_table(table)


WRITERS: dict[str, Callable[[Path, pa.Table], None]] = {
    "set.parquet": lambda path, table: pq.write_table(table, path),
    "set.arrow": write_arrow_file,
    "stream.arrow": write_arrow_stream,
}


@pytest.mark.parametrize("name", WRITERS)
def test_null_keys_of_nested_structs_are_left_out(tmp_path: Path, name: str) -> None:
    rows = [{**row, "tests": [part for part in row["tests"] if isinstance(part, dict)]} for row in CALLS]
    WRITERS[name](tmp_path / name, pa.Table.from_pylist(rows))
    expected = [{**row, "extra_info": row["extra_info"] and dict(row["extra_info"])} for row in rows]
    del expected[0]["extra_info"]["nothing"]
    assert read(tmp_path / name) == expected


def test_a_message_keeps_null_as_its_content_in_parquet(tmp_path: Path) -> None:
    calls = [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]
    talk = [user("a"), {"role": "assistant", "content": None, "tool_calls": calls}, {"role": "tool", "content": "1"}]
    pq.write_table(pa.Table.from_pylist([{"prompt": talk}]), tmp_path / "set.parquet")
    assert read(tmp_path / "set.parquet") == [{"prompt": talk}]


def test_columns_that_hold_json_by_their_type_are_parsed(tmp_path: Path) -> None:
    values = [{"a": 1}, {"b": [None]}]
    column = pa.array([json.dumps(value) for value in values], pa.json_())
    pq.write_table(pa.table({"prompt": ["x", "y"], "extra_info": column}), tmp_path / "set.parquet")
    assert [row["extra_info"] for row in read(tmp_path / "set.parquet")] == values


def test_values_of_parquet_become_those_of_json(tmp_path: Path) -> None:
    instant = datetime.datetime(2026, 1, 2, 3, 4, 5, 678901, datetime.UTC)
    table = pa.table(
        {
            "prompt": pa.array(["a"], pa.dictionary(pa.int8(), pa.string())),
            "day": pa.array([datetime.date(2026, 1, 2)]),
            "instant": pa.array([instant], pa.timestamp("ns", "UTC")),
            "price": pa.array([decimal.Decimal("1.25")]),
            "count": pa.array([decimal.Decimal("12")], pa.decimal128(10, 0)),
            "scores": pa.array([[("a", 1.0)]], pa.map_(pa.string(), pa.float64())),
            "times": pa.array([[datetime.time(1, 2)]], pa.list_(pa.time32("s"))),
        }
    )
    pq.write_table(table, tmp_path / "set.parquet")
    (row,) = read(tmp_path / "set.parquet")
    assert json.loads(json.dumps(row)) == row
    assert row == {
        "prompt": "a",
        "day": "2026-01-02",
        "instant": "2026-01-02T03:04:05.678901+00:00",
        "price": 1.25,
        "count": 12,
        "scores": {"a": 1.0},
        "times": ["01:02:00"],
    }


def test_columns_of_bytes_are_left_out_and_named(tmp_path: Path) -> None:
    image = [{"bytes": b"\x00", "path": "a.png"}]
    pq.write_table(pa.table({"prompt": ["a"], "image": image, "raw": [b"\xff"]}), tmp_path / "set.parquet")
    examples = read_examples(tmp_path / "set.parquet", "prompts", others=None)
    assert (examples.columns, examples.notes) == ({"prompt": ["a"]}, ("columns of bytes are left out: image, raw",))
    pq.write_table(pa.table({"prompt": [b"a"]}), tmp_path / "set.parquet")
    with pytest.raises(InputError, match="column 'prompt' holds neither text nor messages"):
        read(tmp_path / "set.parquet")


def test_numbers_of_any_length_are_read(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "n": 2**80}, {"prompt": "b", "n": 0.5}, {"prompt": "c", "n": -1}]
    (tmp_path / "set.jsonl").write_bytes(lines(rows))
    assert read(tmp_path / "set.jsonl") == rows


@pytest.mark.parametrize("name", ["set.jsonl", "set.json", "set.csv"])
def test_byte_order_marks_carriage_returns_and_blank_lines_do_not_count(tmp_path: Path, name: str) -> None:
    contents = {
        "set.jsonl": '{"prompt": "a"}\r\n\r\n{"prompt": "b"}\r\n\r\n',
        "set.json": '\r\n[{"prompt": "a"},\r\n\r\n{"prompt": "b"}]\r\n',
        "set.csv": "prompt\r\na\r\n\r\nb\r\n\r\n",
    }
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + contents[name].encode())
    examples = read_examples(tmp_path / name, "prompts")
    assert examples.columns["prompt"] == ["a", "b"]
    first = {"set.jsonl": 1, "set.json": 2, "set.csv": 2}[name]
    assert [examples.where(row) for row in (0, 1)] == [f"{tmp_path / name}, line {first + by}" for by in (0, 2)]


def test_cells_of_csv_are_text_numbers_or_missing(tmp_path: Path) -> None:
    (tmp_path / "set.csv").write_text(
        'prompt,n,share,id,answer\n"a, ""b""\nc",1,0.5,007,\n12,-3,2.0,010,x\n', encoding="utf-8"
    )
    examples = read_examples(tmp_path / "set.csv", "prompts", others=None)
    assert examples.columns == {
        "prompt": ['a, "b"\nc', "12"],
        "n": [1, -3],
        "share": [0.5, 2.0],
        "id": ["007", "010"],
        "answer": [None, "x"],
    }
    assert examples.where(1) == f"{tmp_path / 'set.csv'}, line 4"


@pytest.mark.parametrize(("name", "mark"), [("set.tsv", "\t"), ("set.csv", ";"), ("tabs.csv", "\t")])
def test_cells_may_be_separated_by_tabs_and_semicolons(tmp_path: Path, name: str, mark: str) -> None:
    (tmp_path / name).write_text(f"prompt{mark}answer\na, b{mark}c\n", encoding="utf-8")
    assert read(tmp_path / name) == [{"prompt": "a, b", "answer": "c"}]


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        ("set.jsonl", b'{"prompt": "a"}\n{"prompt": "b', "line 2: not JSON ("),
        ("set.json", b'[{"prompt": "a"},\n {"prompt": "b', "line 2: not JSON from here on, so no later row is read ("),
        ("set.json", b'[{"prompt": "a"},\n 3]', "line 2: not a JSON object"),
        ("set.csv", b'prompt,n\na,1\n"b', "line 3: not CSV ("),
        ("set.csv", b"prompt,n\na,1\nb\n", "line 3: 1 values, but 2 columns"),
        ("set.csv", b"prompt,n\na,1\n\xff,2\n", "line 3: not CSV in UTF-8"),
        ("set.jsonl", b'{"prompt": "a"}\n{"prompt": "\xff"}', "line 2: not JSON in UTF-8 ("),
    ],
)
def test_a_damaged_row_is_named_with_its_line(tmp_path: Path, name: str, content: bytes, error: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as raised:
        read(tmp_path / name)
    assert str(raised.value).startswith(f"{tmp_path / name}, {error}")
    broken = BrokenRows("skip")
    assert [row["prompt"] for row in read(tmp_path / name, broken)] == ["a"]
    assert len(broken.errors) == 1


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        ("set.jsonl.gz", b"no gzip", "not JSON Lines ("),
        ("set.jsonl.gz", gzip.compress(lines(CALLS * 99), mtime=0)[:-20], "not JSON Lines ("),
        ("set.json.xz", b"no xz", "not JSON ("),
        ("set.csv.zst", b"no zstd", "not CSV ("),
        ("set.json", b'{"prompt": {"0": "a"}}', "a JSON data set is a list of objects or one object a line; this is"),
        ("set.json", b'"text"', "a JSON data set is a list of objects or one object a line; this is no object"),
        ("set.csv", b"prompt,prompt\na,b\n", "its first line must name each column once"),
        ("set.json", b"[]", "the data set is empty"),
        ("set.csv", b"prompt\n", "the data set is empty"),
    ],
)
def test_a_file_of_other_content_is_refused(tmp_path: Path, name: str, content: bytes, error: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as raised:
        read(tmp_path / name)
    assert str(raised.value).startswith(f"{tmp_path / name}: {error}")
