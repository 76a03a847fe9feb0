"""Test how data sets are recognised by their columns, and what becomes of their rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.data.datasets import Kind, describe, read_examples
from cluster.errors import InputError
from tests.support.chat import assistant, user

Rows = list[dict[str, Any]]
SYSTEM = {"role": "system", "content": "s"}


def turn(speaker: str, value: Any) -> dict[str, Any]:
    return {"from": speaker, "value": value}


TALK = [turn("human", "q"), turn("gpt", "a")]


def write(folder: Path, rows: Rows) -> Path:
    path = folder / "set.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


CALL = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "f", "x": 1}}]}
RECOGNISED: list[tuple[Kind, dict[str, Any], dict[str, Any], str]] = [
    ("sft", {"conversations": TALK}, {"messages": [user("q"), assistant("a")]}, "ShareGPT: turns in conversations"),
    (
        "sft",
        {"conversation": [user("q"), assistant("a")]},
        {"messages": [user("q"), assistant("a")]},
        "messages in conversation",
    ),
    (
        "sft",
        {"system": "s", "conversations": [*TALK, turn("function_call", '{"name": "f", "x": 1}')]},
        {"messages": [SYSTEM, user("q"), assistant("a"), CALL]},
        "ShareGPT: turns in conversations after the column system",
    ),
    (
        "sft",
        {"instruction": "i", "input": "x", "output": "o", "text": "i x o"},
        {"prompt": "i\n\nx", "completion": "o"},
        "Alpaca: prompt is instruction and input, completion is output",
    ),
    (
        "sft",
        {"instruction": "i", "input": "", "output": "o"},
        {"prompt": "i", "completion": "o"},
        "Alpaca: prompt is instruction and input, completion is output",
    ),
    (
        "sft",
        {"instruction": "i", "output": "o", "system": "s", "history": [["q", "a"]]},
        {"messages": [SYSTEM, user("q"), assistant("a"), user("i"), assistant("o")]},
        "Alpaca with system and history, as messages",
    ),
    (
        "sft",
        {"question": "q", "answer": "a #### 1"},
        {"prompt": "q", "completion": "a #### 1"},
        "prompt is question, completion is answer",
    ),
    (
        "sft",
        {"text": "whole"},
        {"prompt": "", "completion": "whole"},
        "column text, which is trained on as a whole",
    ),
    (
        "prompts",
        {"conversations": TALK},
        {"prompt": [user("q")]},
        "ShareGPT: turns in conversations, up to the last answer",
    ),
    (
        "prompts",
        {"messages": [user("q")]},
        {"prompt": [user("q")]},
        "messages in messages, up to the last answer",
    ),
    ("prompts", {"instruction": "i", "input": "x"}, {"prompt": "i\n\nx"}, "prompt is instruction and input"),
    ("prompts", {"question": "q", "answer": 1}, {"prompt": "q"}, "prompt is question"),
    (
        "preferences",
        {"prompt": "q", "chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("b")]},
        {"prompt": [user("q")], "chosen": [assistant("a")], "rejected": [assistant("b")]},
        "the prompt is the first messages of chosen and rejected",
    ),
    (
        "preferences",
        {"prompt": "q", "chosen": [assistant("a")], "rejected": [assistant("b")]},
        {"prompt": [user("q")], "chosen": [assistant("a")], "rejected": [assistant("b")]},
        "the prompt is the first messages of chosen and rejected",
    ),
    (
        "preferences",
        {"prompt": [user("q")], "chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("b")]},
        {"prompt": [user("q")], "chosen": [assistant("a")], "rejected": [assistant("b")]},
        "",
    ),
    (
        "preferences",
        {"conversations": TALK[:1], "chosen": turn("gpt", "a"), "rejected": turn("gpt", "b")},
        {"prompt": [user("q")], "chosen": [assistant("a")], "rejected": [assistant("b")]},
        "ShareGPT: turns in conversations",
    ),
    (
        "preferences",
        {"question": "q", "chosen": "a", "rejected": "b"},
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        "prompt is question",
    ),
    (
        "preferences",
        {"chosen": "The sky is blue.", "rejected": "The sky is brown."},
        {"prompt": "The sky is", "chosen": " blue.", "rejected": " brown."},
        "the prompt is the common beginning of chosen and rejected",
    ),
    (
        "preferences",
        {"chosen": "\n\nHuman: q\n\nAssistant: I do", "rejected": "\n\nHuman: q\n\nAssistant: I don't"},
        {"prompt": "\n\nHuman: q\n\nAssistant:", "chosen": " I do", "rejected": " I don't"},
        "the prompt is the common beginning of chosen and rejected",
    ),
]


@pytest.mark.parametrize(("kind", "row", "made", "note"), RECOGNISED)
def test_a_data_set_is_recognised_by_its_columns(
    tmp_path: Path, kind: Kind, row: dict[str, Any], made: dict[str, Any], note: str
) -> None:
    path = write(tmp_path, [row])
    examples = read_examples(path, kind)
    assert {name: values[0] for name, values in examples.columns.items()} == made
    assert examples.form.columns == tuple(made)
    assert examples.form.conversational == (not isinstance(next(iter(made.values())), str))
    notes = (note,) if note else ()
    assert examples.notes == notes == describe(path, kind).notes


def test_rows_with_labels_are_read_unpaired_if_asked(tmp_path: Path) -> None:
    labels = [True, False, 1, 0, "true", "False"]
    path = write(tmp_path, [{"prompt": "p", "completion": "c", "label": label} for label in labels])
    examples = read_examples(path, "preferences", paired=False)
    assert examples.columns["label"] == [True, False] * 3
    assert len(read_examples(path, "preferences")) == len(labels) // 2


@pytest.mark.parametrize(
    ("kind", "row", "what"),
    [
        (
            "sft",
            {"conversations": [turn("human", "q"), turn("alien", "a")]},
            "a turn is from 'alien', which is none of",
        ),
        ("sft", {"conversations": [turn("human", None), turn("gpt", "a")]}, "a turn without value as text"),
        ("sft", {"conversations": [turn("human", "q"), turn("function_call", "f(")]}, "a function_call is not JSON"),
        ("sft", {"messages": [user("q"), assistant("a"), {"role": "assistant"}]}, "a message without content as text"),
        ("prompts", {"messages": [assistant("a")]}, "no message precedes the assistant's"),
        ("preferences", {"chosen": "a", "rejected": "b"}, "chosen and rejected have no common beginning"),
        (
            "preferences",
            {"prompt": "other", "chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("b")]},
            "the prompt is none of the first messages of chosen and rejected",
        ),
        ("prompts", {"prompt": "p", "tools": [1]}, "column 'tools': expected a list of JSON schemas, got [1]"),
        ("prompts", {"prompt": "p", "tools": "["}, "column 'tools': not JSON ("),
    ],
)
def test_a_row_that_does_not_fit_is_named(tmp_path: Path, kind: Kind, row: dict[str, Any], what: str) -> None:
    good = [each for known, each, _, _ in RECOGNISED if known == kind and set(each) == set(row)][:1] * 3
    path = write(tmp_path, [*good, row])
    with pytest.raises(InputError) as error:
        read_examples(path, kind, others=None)
    assert what in error.value.what
    assert error.value.where == f"{path}, line {len(good) + 1}"


def test_tools_are_a_list_of_schemas_or_a_text_of_json(tmp_path: Path) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    rows = [{"prompt": "p", "tools": value} for value in ([tool], json.dumps([tool]), None, [], "")]
    examples = read_examples(write(tmp_path, rows), "prompts", others=("tools",))
    assert examples.columns["tools"] == [[tool], [tool], None, None, None]


def test_the_text_of_a_content_in_parts_is_joined(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    path = write(tmp_path, [{"prompt": [{"role": "user", "content": parts}]}])
    assert read_examples(path, "prompts").columns["prompt"] == [[user("ab")]]
    write(tmp_path, [{"prompt": [{"role": "user", "content": [*parts, {"type": "image", "image": "x.png"}]}]}])
    with pytest.raises(InputError, match="a message has a part of type 'image', not text"):
        read_examples(path, "prompts")


REFERENCES = [
    ({"reward_model": {"style": "rule", "ground_truth": "7"}, "solution": "8"}, "7", "reward_model.ground_truth"),
    ({"ground_truth": ["7", "seven"]}, ["7", "seven"], "ground_truth"),
    ({"answer": "3 + 4 = 7\n#### 1,007"}, "1007", "what follows #### in answer"),
    ({"solution": "$7$", "answer": "7"}, "$7$", "solution"),
]


@pytest.mark.parametrize(("columns", "references", "source"), REFERENCES)
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_references_are_found_under_the_names_of_others(
    tmp_path: Path, columns: dict[str, Any], references: Any, source: str, suffix: str
) -> None:
    path = tmp_path / f"set{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist([{"prompt": "p", **columns}]), path)
    else:
        path = write(tmp_path, [{"prompt": "p", **columns}])
    examples = read_examples(path, "prompts", others=None)
    assert examples.columns == {
        "prompt": ["p"],
        **{name: [value] for name, value in columns.items()},
        "references": [references],
    }
    assert examples.notes == (f"references are {source}",)
    own = {"references": "own"}
    path = write(tmp_path, [{"prompt": "p", **columns, **own}])
    assert read_examples(path, "prompts", others=None).columns["references"] == ["own"]


def test_any_column_may_be_renamed_and_taken_from_within_another(tmp_path: Path) -> None:
    rows: Rows = [{"q": "p", "meta": {"gold": [{"value": "7"}]}, "a.b": 1, "n": 2}, {"q": "p", "meta": None}]
    names = {"prompt": "q", "references": "meta.gold.0.value", "score": "a.b", "mine": "n"}
    examples = read_examples(write(tmp_path, rows), "prompts", others=None, columns=names)
    assert examples.columns == {
        "prompt": ["p", "p"],
        "meta": [{"gold": [{"value": "7"}]}, None],
        "score": [1, None],
        "mine": [2, None],
        "references": ["7", None],
    }
