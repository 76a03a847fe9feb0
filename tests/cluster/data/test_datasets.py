"""Test reading data sets: every supported form, and the errors of invalid ones."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.data.datasets import Examples, Form, Kind, describe, read_examples
from cluster.data.invalid_rows import BrokenRows
from cluster.errors import InputError
from tests.support.chat import assistant, user

Rows = list[dict[str, Any]]
TEXTS: Rows = [{"prompt": f"p{i}", "completion": f"c{i}", "n": i} for i in range(5)]
MESSAGES: Rows = [{"messages": [user(f"u{i}"), assistant(f"a{i}")]} for i in range(5)]


def rows_of(examples: Examples) -> Rows:
    columns = examples.columns
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def write_lines(path: Path, rows: Rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_parquet(path: Path, rows: Rows) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def save_to_disk(path: Path, rows: Rows) -> Path:
    from datasets import Dataset

    Dataset.from_list(rows).save_to_disk(path, num_shards=2)
    return path


def save_splits(path: Path, rows: Rows) -> Path:
    from datasets import Dataset, DatasetDict

    DatasetDict(train=Dataset.from_list(rows), test=Dataset.from_list(rows[:1])).save_to_disk(path)
    return path


def write_shards(path: Path, rows: Rows) -> Path:
    path.mkdir()
    write_parquet(path / "b.parquet", rows[3:])
    write_parquet(path / "a.parquet", rows[:3])
    (path / "README.md").touch()
    return path


def write_line_shards(path: Path, rows: Rows) -> Path:
    path.mkdir()
    for number in range(0, len(rows), 2):
        write_lines(path / f"{number}.jsonl", rows[number : number + 2])
    return path


def write_shards_of_splits(path: Path, rows: Rows) -> Path:
    path.mkdir()
    write_parquet(path / "train-00000-of-00001.parquet", rows)
    write_parquet(path / "test-00000-of-00001.parquet", rows)
    return path


WRITERS: dict[str, Callable[[Path, Rows], Path]] = {
    "set.jsonl": write_lines,
    "set.parquet": write_parquet,
    "saved": save_to_disk,
    "saved_splits": save_splits,
    "shards": write_shards,
    "line_shards": write_line_shards,
    "hub": write_shards_of_splits,
}


@pytest.mark.parametrize("rows", [TEXTS, MESSAGES], ids=["texts", "messages"])
@pytest.mark.parametrize("name", WRITERS)
def test_every_form_of_file_holds_the_same_rows_in_their_order(tmp_path: Path, name: str, rows: Rows) -> None:
    path = WRITERS[name](tmp_path / name, rows)
    examples = read_examples(path, "sft", others=None)
    assert rows_of(examples) == rows
    described = describe(path, "sft")
    assert (described.num_rows, described.columns) == (5, tuple(rows[0]))
    assert described.form == examples.form
    assert described.form.conversational == (rows is MESSAGES)


@pytest.mark.parametrize(
    ("kind", "row", "form"),
    [
        ("sft", {"prompt": "p", "completion": "c"}, Form(("prompt", "completion"), False)),
        ("sft", {"prompt": "p", "messages": [user("p"), assistant("c")]}, Form(("messages",), True)),
        ("sft", {"prompt": [user("p")], "completion": [assistant("c")]}, Form(("prompt", "completion"), True)),
        ("prompts", {"prompt": "p", "answer": 3}, Form(("prompt",), False)),
        ("prompts", {"prompt": [user("p")]}, Form(("prompt",), True)),
        ("preferences", {"prompt": "p", "chosen": "c", "rejected": "r"}, Form(("prompt", "chosen", "rejected"), False)),
        (
            "preferences",
            {"chosen": [user("p"), assistant("c")], "rejected": [user("p"), assistant("r")], "margin": 1.0},
            Form(("chosen", "rejected"), True),
        ),
    ],
)
def test_each_of_trls_forms_is_found(tmp_path: Path, kind: Kind, row: dict[str, Any], form: Form) -> None:
    path = write_lines(tmp_path / "set.jsonl", [row])
    examples = read_examples(path, kind)
    assert examples.form == form
    assert examples.columns == {name: [row[name]] for name in form.columns}


def test_other_columns_are_read_if_asked_for(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "set.parquet", [{"prompt": "p", "margin": 1, "x": None}])
    assert set(read_examples(path, "prompts").columns) == {"prompt"}
    assert set(read_examples(path, "prompts", others=("margin", "other")).columns) == {"prompt", "margin"}
    assert read_examples(path, "prompts", others=None).columns == {"prompt": ["p"], "margin": [1], "x": [None]}


def test_text_that_looks_like_a_time_stays_text(tmp_path: Path) -> None:
    rows = [{"prompt": "2020-01-01", "completion": "2020-01-02T03:04:05"}]
    assert rows_of(read_examples(write_lines(tmp_path / "a.jsonl", rows), "sft")) == rows
    talk = [{"messages": [user("2020-01-01"), assistant("2020-01-02")]}]
    assert rows_of(read_examples(write_lines(tmp_path / "b.jsonl", talk), "sft")) == talk


def test_a_row_may_have_megabytes(tmp_path: Path) -> None:
    rows = [{"prompt": "long " * 500_000}, {"prompt": "short"}]
    assert rows_of(read_examples(write_lines(tmp_path / "a.jsonl", rows), "prompts")) == rows


def test_a_key_that_only_some_messages_have_is_left_out_of_the_others(tmp_path: Path) -> None:
    talk = [{**user("a"), "name": "Ann"}, user("b")]
    path = write_parquet(tmp_path / "set.parquet", [{"prompt": talk}])
    assert read_examples(path, "prompts").columns["prompt"] == [talk]


def refused(path: Path, kind: Kind = "sft") -> str:
    with pytest.raises(InputError) as error:
        read_examples(path, kind)
    assert error.value.where.startswith(str(path))
    return error.value.what


@pytest.mark.parametrize(
    ("rows", "what"),
    [
        ([{"prompt": "a", "answer": "b"}], "no column 'completion'; it has prompt, answer"),
        ([{"prompt": "a", "completion": 3}], "column 'completion' holds neither text nor messages of role and content"),
        ([{"messages": [{"text": "a"}]}], "no column 'prompt'; it has messages"),
        ([{"prompt": "a", "completion": "b"}, {"prompt": None}], "column 'prompt': expected text, got None"),
        ([{"messages": [user("a")]}, {"messages": []}], "column 'messages': no messages"),
        (
            [{"messages": [user("a")]}, {"messages": [{"role": "user"}]}],
            "column 'messages': a message without content as text",
        ),
        (
            [{"prompt": "a", "completion": [assistant("b")]}],
            "column 'prompt' holds text, but 'completion' holds messages: use one kind, or leave out 'prompt' if the "
            "messages include it",
        ),
    ],
)
def test_a_wrong_column_or_row_is_named(tmp_path: Path, rows: Rows, what: str) -> None:
    assert refused(write_lines(tmp_path / "set.jsonl", rows)) == what


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("none.parquet", None, "no such data set"),
        ("none", None, "no such data set"),
        ("set.txt", "prompt\n", "a data set is a folder or ends in .parquet, .jsonl, .json, .csv or .tsv"),
        ("set.parquet.gz", "", "a data set is a folder or ends in .parquet"),
        ("bad.parquet", "x", "not Parquet ("),
        ("bad.jsonl", "x\n", "not JSON ("),
        ("bad.jsonl", '{"prompt": "a"}\n{"prompt": \n', "not JSON ("),
        ("list.jsonl", "[]\n", "not a JSON object"),
        ("empty.jsonl", "", "the data set is empty"),
    ],
)
def test_a_file_that_is_no_data_set_is_named(tmp_path: Path, name: str, content: str | None, what: str) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    assert refused(tmp_path / name).startswith(what)


@pytest.mark.parametrize(
    ("files", "what"),
    [
        ({"README.md": ""}, "holds neither a saved data set nor files that end in .parquet"),
        ({"a.jsonl": '{"prompt": "a"}\n', "b.parquet": ""}, "holds files of JSON Lines and Parquet"),
        ({"a.jsonl": '{"prompt": "a"}\n', "b.jsonl": '{"prompt": [1]}\n'}, "column 'prompt': expected text, got [1]"),
        ({"dataset_dict.json": '{"splits": ["test"]}'}, "has no split 'train', only test: name the folder of one"),
        ({"dataset_dict.json": "[]"}, "is not in the format that datasets writes ("),
        ({"state.json": '{"_data_files": []}'}, "names no data_files"),
        ({"state.json": '{"_data_files": [{"filename": "a.arrow"}]}'}, "not an Arrow stream ("),
    ],
)
def test_a_folder_that_is_no_data_set_is_named(tmp_path: Path, files: dict[str, str], what: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    assert refused(tmp_path, "prompts").startswith(what)


def test_a_description_looks_only_at_the_first_rows(tmp_path: Path) -> None:
    path = tmp_path / "set.jsonl"
    path.write_text('{"prompt": "a"}\n' * 150 + "\nnot read\n")
    described = describe(path, "prompts")
    assert (described.num_rows, described.columns) == (151, ("prompt",))


def imported(modules: Sequence[str], code: str) -> str:
    check = f"import sys\n{code}\nprint([name for name in {list(modules)} if name in sys.modules])"
    return subprocess.run([sys.executable, "-c", check], check=True, capture_output=True, text=True).stdout.strip()


@pytest.mark.process
def test_reading_imports_nothing_heavy(tmp_path: Path) -> None:
    path = save_splits(tmp_path / "saved", TEXTS)
    code = f"import pathlib, cluster.data.datasets as d; d.read_examples(pathlib.Path({str(path)!r}), 'sft')"
    assert imported(("torch", "ray", "vllm", "transformers", "datasets", "pandas"), code) == "[]"


LABELLED: Rows = [
    {"prompt": "p", "completion": "good 1", "label": True},
    {"prompt": "q", "completion": "alone", "label": True},
    {"prompt": "p", "completion": "bad 1", "label": False},
    {"prompt": "p", "completion": "good 2", "label": True},
    {"prompt": "p", "completion": "good 3", "label": True},
    {"prompt": "p", "completion": "bad 2", "label": False},
]


def test_rows_with_a_label_are_paired_by_prompt_and_the_rest_is_counted(tmp_path: Path) -> None:
    path, broken = write_parquet(tmp_path / "set.parquet", LABELLED), BrokenRows()
    examples = read_examples(path, "preferences", broken=broken)
    assert examples.form == Form(("prompt", "chosen", "rejected"), False)
    pairs = {"prompt": ["p", "p"], "chosen": ["good 1", "good 2"], "rejected": ["bad 1", "bad 2"]}
    assert examples.columns == pairs
    assert (broken.num_unpaired, broken.errors) == (2, [])
    assert [examples.where(row) for row in range(2)] == [f"{path}, row 0", f"{path}, row 3"]


def test_conversations_with_a_label_are_paired_too(tmp_path: Path) -> None:
    rows = [{"prompt": [user("p")], "completion": [assistant(text)], "label": text == "yes"} for text in ("no", "yes")]
    examples = read_examples(write_lines(tmp_path / "set.jsonl", rows), "preferences")
    assert examples.form.conversational
    assert (examples.columns["chosen"], examples.columns["rejected"]) == ([[assistant("yes")]], [[assistant("no")]])


@pytest.mark.parametrize(
    ("rows", "what"),
    [
        ([{**LABELLED[0], "label": "yes"}], "column 'label' does not hold true or false"),
        ([LABELLED[0], {**LABELLED[2], "label": None}], "column 'label': expected true or false, got None"),
        (LABELLED[:2], "no prompt has both a completion labelled true and one labelled false"),
    ],
)
def test_labels_that_make_no_pair_are_refused(tmp_path: Path, rows: Rows, what: str) -> None:
    assert refused(write_lines(tmp_path / "set.jsonl", rows), "preferences") == what


def test_columns_are_found_under_other_names_if_given(tmp_path: Path) -> None:
    columns = {"prompt": "question", "completion": "answer"}
    renamed = write_parquet(tmp_path / "a.parquet", [{"question": "q", "answer": "a", "prompt": "other", "n": 1}])
    assert read_examples(renamed, "sft", columns=columns).columns == {"prompt": ["q"], "completion": ["a"]}
    assert read_examples(renamed, "prompts", columns=columns, others=None).columns["n"] == [1]
    plain = write_parquet(tmp_path / "b.parquet", TEXTS)
    assert read_examples(plain, "sft", columns=columns).columns["prompt"] == ["p0", "p1", "p2", "p3", "p4"]


BROKEN = (
    b'{"prompt": 1, "completion": "c"}',
    b'{"prompt": "a", "completion": "b"}',
    b"",
    b"{not json",
    b'{"prompt": "\xff", "completion": "b"}',
    b'{"prompt": "c", "completion": ["d"]}',
    b"[1]",
    b'{"prompt": "e"}',
    b'{"prompt": "f", "completion": "g"}',
    b"[" * 100_000,
)


def test_broken_rows_are_skipped_and_named_by_line_if_asked(tmp_path: Path) -> None:
    path, broken = tmp_path / "set.jsonl", BrokenRows("skip")
    path.write_bytes(b"\n".join(BROKEN))
    examples = read_examples(path, "sft", broken=broken)
    assert examples.columns == {"prompt": ["a", "f"], "completion": ["b", "g"]}
    assert [examples.where(row) for row in range(2)] == [f"{path}, line 2", f"{path}, line 9"]
    lines = [int(error.where.removeprefix(f"{path}, line ")) for error in broken.errors]
    assert sorted(lines) == [1, 4, 5, 6, 7, 8, 10]
    with pytest.raises(InputError, match=r"set\.jsonl, line "):
        read_examples(path, "sft")


def test_rows_are_counted_over_all_files_of_a_folder(tmp_path: Path) -> None:
    folder, broken = tmp_path / "set", BrokenRows("skip")
    folder.mkdir()
    (folder / "a.jsonl").write_text('{"prompt": "a"}\n{"prompt": null}\n\n{"prompt": "b"}\n')
    (folder / "b.jsonl").write_text('{"prompt": "c"}\n{"prompt"\n{"prompt": "d"}\n')
    examples = read_examples(folder, "prompts", broken=broken)
    assert examples.columns["prompt"] == ["a", "b", "c", "d"]
    places = [
        f"{folder}/a.jsonl, line 1",
        f"{folder}/a.jsonl, line 4",
        *(f"{folder}/b.jsonl, line {n}" for n in (1, 3)),
    ]
    assert [examples.where(row) for row in range(4)] == places
    assert {error.where for error in broken.errors} == {f"{folder}/a.jsonl, line 2", f"{folder}/b.jsonl, line 2"}


def test_broken_rows_of_parquet_are_named_by_row(tmp_path: Path) -> None:
    shards, broken = tmp_path / "set", BrokenRows("skip")
    shards.mkdir()
    write_parquet(shards / "a.parquet", [{"prompt": "a"}, {"prompt": "b"}])
    write_parquet(shards / "b.parquet", [{"prompt": "c"}, {"prompt": None}])
    assert read_examples(shards, "prompts", broken=broken).columns["prompt"] == ["a", "b", "c"]
    assert [str(error) for error in broken.errors] == [
        f"{shards}/b.parquet, row 1: column 'prompt': expected text, got None"
    ]


def test_nothing_but_broken_rows_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "set.jsonl"
    path.write_text("x\ny\n")
    with pytest.raises(InputError, match=r"set.jsonl: all 2 rows are broken; .*line 1: not JSON"):
        read_examples(path, "prompts", broken=BrokenRows("skip"))
    path.write_text('{"prompt": "a", "completion": null}\n{"prompt": null, "completion": "b"}\n')
    with pytest.raises(
        InputError, match=r"all 2 rows are broken; .*line 1: column 'completion': expected text, got None"
    ):
        read_examples(path, "sft", broken=BrokenRows("skip"))
