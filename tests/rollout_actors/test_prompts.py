"""Reading prompt rows and turning them into tokens."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from cluster.errors import InputError
from rollout_actors.prompts import PromptTokenizer, read_rows

ROWS = [{"prompt": "a", "reference": 1}, {"prompt": "b", "reference": 2}]


def test_parquet_and_json_lines_give_the_same_rows(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pa.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "reference": 1}\n{"prompt": "b", "reference": 2}\n')
    assert read_rows(tmp_path / "rows.parquet") == read_rows(tmp_path / "rows.jsonl") == ROWS


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("missing.jsonl", None, "no such dataset file"),
        ("rows.jsonl", "", "the dataset is empty"),
        ("rows.jsonl", '{"text": "a"}\n', "has no column 'prompt'; its columns are text"),
        ("rows.jsonl", '{"prompt": "a"}\n{"prompt": null}\n', "row 1 has no 'prompt'"),
        ("rows.jsonl", '{"prompt": ', "cannot be read as jsonl"),
        ("rows.parquet", "not parquet", "cannot be read as parquet"),
        ("rows.csv", "prompt\na\n", "a dataset is a file ending in .parquet or .jsonl"),
    ],
)
def test_a_bad_dataset_is_named(tmp_path: Path, name: str, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        read_rows(tmp_path / name)
    assert caught.value.where == str(tmp_path / name)


def test_a_parquet_file_without_rows_is_empty(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pa.table({"prompt": pa.array([], pa.string())}), tmp_path / "rows.parquet")
    with pytest.raises(InputError, match="empty"):
        read_rows(tmp_path / "rows.parquet")


def test_reading_prompts_imports_neither_torch_nor_ray() -> None:
    code = "import sys, rollout_actors.prompts; assert not {'torch', 'ray', 'vllm', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_prompts_become_tokens_and_responses_become_text(tied_folder: Path) -> None:
    tokenizer = PromptTokenizer(str(tied_folder), max_prompt_tokens=3)
    assert tokenizer.encode(["t5 t6 t7", "t4"]) == [[5, 6, 7], [4]]
    assert tokenizer.decode([[8, 9, 1], [4]]) == ["t8 t9", "t4"]


@pytest.mark.parametrize(("prompt", "message"), [("t5 t6 t7 t8", "has 4 tokens, more than 3"), ("", "has no tokens")])
def test_a_prompt_that_cannot_be_sampled_is_named(tied_folder: Path, prompt: str, message: str) -> None:
    tokenizer = PromptTokenizer(str(tied_folder), max_prompt_tokens=3)
    with pytest.raises(InputError, match=message) as caught:
        tokenizer.encode([prompt])
    assert repr(prompt) in str(caught.value)


def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no usable tokenizer") as caught:
        PromptTokenizer(str(tmp_path), max_prompt_tokens=3)
    assert caught.value.where == str(tmp_path)
