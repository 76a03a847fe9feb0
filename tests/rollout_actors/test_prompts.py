"""Tests of reading prompts and of their tokenizer."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from cluster.data.datasets import Reading
from cluster.data.invalid_rows import BrokenRows
from cluster.errors import InputError
from rollout_actors.prompt_screen import quick_rows, ready_rows, rendered_rows
from rollout_actors.prompts import PromptTokenizer, holds_messages, read_rows
from tests.support.chat import assistant, make_tokenizer, user

ROWS = [{"prompt": "a", "reference": 1}, {"prompt": "b", "reference": 2}]


def test_parquet_and_json_lines_give_the_same_rows(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pa.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "reference": 1}\n{"prompt": "b", "reference": 2}\n')
    assert read_rows(tmp_path / "rows.parquet") == read_rows(tmp_path / "rows.jsonl") == ROWS


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("missing.jsonl", None, "no such data set"),
        ("rows.jsonl", "", "the data set is empty"),
        ("rows.jsonl", '{"text": "a"}\n', "no column 'prompt'; it has text"),
        ("rows.jsonl", '{"prompt": "a"}\n{"prompt": null}\n', "line 2: column 'prompt': expected text, got None"),
    ],
)
def test_the_error_names_the_file_or_line_of_a_bad_data_set(
    tmp_path: Path, name: str, text: str | None, message: str
) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        read_rows(tmp_path / name)
    assert caught.value.where.startswith(str(tmp_path / name))


@pytest.mark.process
def test_reading_prompts_imports_neither_torch_nor_ray() -> None:
    code = "import sys, rollout_actors.prompts; assert not {'torch', 'ray', 'vllm', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_prompts_become_tokens_and_responses_become_text(tied_folder: Path) -> None:
    tokenizer = PromptTokenizer(str(tied_folder), max_prompt_tokens=3)
    assert tokenizer.encode(["t5 t6 t7", "t4"]) == [[5, 6, 7], [4]]
    assert tokenizer.decode([[8, 9, 1], [4]]) == ["t8 t9", "t4"]


@pytest.mark.parametrize(("prompt", "message"), [("t5 t6 t7 t8", "has 4 tokens, more than 3"), ("", "has no tokens")])
def test_the_error_names_a_prompt_that_is_empty_or_too_long(tied_folder: Path, prompt: str, message: str) -> None:
    tokenizer = PromptTokenizer(str(tied_folder), max_prompt_tokens=3)
    with pytest.raises(InputError, match=message) as caught:
        tokenizer.encode([prompt])
    assert repr(prompt) in str(caught.value)


def test_the_error_names_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no usable tokenizer") as caught:
        PromptTokenizer(str(tmp_path), max_prompt_tokens=3)
    assert caught.value.where == str(tmp_path)


CHATS = [{"prompt": [user("ab")], "n": 1}, {"prompt": [user("abcd"), assistant("ef"), user("g")], "n": 2}]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.fixture
def chat_folder(tmp_path: Path) -> Path:
    make_tokenizer().save_pretrained(tmp_path / "chat")
    return tmp_path / "chat"


def test_the_chat_template_formats_conversations_as_texts(tmp_path: Path, chat_folder: Path) -> None:
    path = write_rows(tmp_path / "rows.parquet", CHATS)
    assert holds_messages(read_rows(path))
    (ready,) = ready_rows(path, chat_folder, max_prompt_tokens=64, long_prompts="error")
    assert ready.rows == read_rows(path)
    (rows,) = rendered_rows(ready.rows, chat_folder, 64)
    text = "<bos>[user]abcd<eos>\n[assistant]ef<eos>\n[user]g<eos>\n[assistant]"
    assert rows[1] == {"prompt": text, "n": 2}
    assert not holds_messages(rows)


def test_a_copied_rendered_prompt_gets_the_tokens_of_the_template(tmp_path: Path, chat_folder: Path) -> None:
    path = write_rows(tmp_path / "rows.parquet", CHATS)
    (rows,) = rendered_rows(read_rows(path), chat_folder, 64)
    prompts = [copy.copy(row["prompt"]) for row in rows]
    tokenizer = PromptTokenizer(str(chat_folder), max_prompt_tokens=64)
    expected = [
        make_tokenizer().apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
        for row in CHATS
    ]
    assert tokenizer.encode(prompts) == expected
    text, rendered, bos = tokenizer.encode(["ab", prompts[0], "ab"])[0], expected[0], 2
    assert tokenizer.encode(["ab", prompts[0], "ab"]) == [text, rendered, text]
    assert text[0] == rendered[0] == bos != rendered[1]


def test_prompts_that_are_too_long_raise_or_are_dropped(tmp_path: Path, chat_folder: Path) -> None:
    texts = [{"prompt": "abc"}, {"prompt": "abcdefgh"}, {"prompt": "abcdefg"}]
    for rows, limit, kept in ((texts, 8, [0, 2]), (CHATS, 8, [0])):
        path = write_rows(tmp_path / "rows.parquet", rows)
        whole = next(ready_rows(path, chat_folder, max_prompt_tokens=99, long_prompts="drop")).rows
        fitting = next(ready_rows(path, chat_folder, max_prompt_tokens=limit, long_prompts="drop")).rows
        assert fitting == [whole[index] for index in kept]
        with pytest.raises(InputError, match=r"the prompt of .*rows\.parquet, row 1 has \d+ tokens, more than 8"):
            next(ready_rows(path, chat_folder, max_prompt_tokens=limit, long_prompts="error"))
        with pytest.raises(InputError, match=rf"all {len(rows)} prompts have more than 1 tokens"):
            next(ready_rows(path, chat_folder, max_prompt_tokens=1, long_prompts="drop"))


def test_conversations_need_a_chat_template(tmp_path: Path) -> None:
    make_tokenizer(template=None).save_pretrained(tmp_path / "plain")
    path = write_rows(tmp_path / "rows.parquet", CHATS)
    with pytest.raises(InputError, match=f"the tokenizer of {tmp_path / 'plain'} has no chat template") as error:
        next(ready_rows(path, tmp_path / "plain", max_prompt_tokens=8, long_prompts="error"))
    assert error.value.where == str(path)


def test_the_error_names_the_row_that_the_template_refuses(tmp_path: Path) -> None:
    refusing = "{% if messages | length > 1 %}{{ raise_exception('only one') }}{% endif %}a"
    make_tokenizer(template=refusing).save_pretrained(tmp_path / "chat")
    path = write_rows(tmp_path / "rows.parquet", CHATS)
    with pytest.raises(InputError, match="the chat template refuses it: only one") as error:
        next(ready_rows(path, tmp_path / "chat", max_prompt_tokens=8, long_prompts="error"))
    assert error.value.where == f"{path}, row 1"
    skipping = Reading(broken_rows="skip")
    ready = next(ready_rows(path, tmp_path / "chat", max_prompt_tokens=8, long_prompts="error", reading=skipping))
    assert (len(ready.rows), [str(error.where) for error in ready.broken]) == (len(CHATS) - 1, [f"{path}, row 1"])


@pytest.mark.parametrize("line", [r'{"prompt": "a", "reference": "\ud800"}', r'{"prompt": "x\udce9 y"}'])
@pytest.mark.parametrize("number", [1, 2])
def test_the_error_names_the_row_with_a_lone_surrogate(tmp_path: Path, line: str, number: int) -> None:
    fine = [r'{"prompt": "a", "reference": "\ud83d\ude00"}'] * 2
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([*fine[: number - 1], line, *fine[number - 1 :]]))
    with pytest.raises(InputError, match="not Unicode: a text holds a lone surrogate") as error:
        read_rows(path)
    assert error.value.where == f"{path}, line {number}"
    broken = BrokenRows("skip")
    assert len(read_rows(path, broken=broken)) == len(fine)
    assert len(broken.errors) == 1


def test_a_prompt_with_a_lone_surrogate_is_refused(tied_folder: Path) -> None:
    with pytest.raises(InputError, match="is not Unicode"):
        PromptTokenizer(str(tied_folder), max_prompt_tokens=3).encode(["a\ud800"])


def test_prompts_that_surely_fit_are_not_encoded(tmp_path: Path) -> None:
    Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    path = write_rows(tmp_path / "rows.parquet", [{"prompt": "a" * 8}, {"prompt": "b"}])
    ready = quick_rows(path, tmp_path, max_prompt_tokens=8)
    assert ready is not None
    assert (list(ready.rows), ready.num_readable) == ([{"prompt": "a" * 8}, {"prompt": "b"}], 2)
    assert quick_rows(path, tmp_path, max_prompt_tokens=7) is None
    assert quick_rows(write_rows(tmp_path / "chats.parquet", CHATS), tmp_path, max_prompt_tokens=99) is None


def test_one_conversation_of_each_shape_is_rendered_to_bound_the_others(
    tmp_path: Path, chat_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rendered: list[int] = []
    ready = PromptTokenizer.ready

    def counted(self: PromptTokenizer, row: dict[str, Any], where: str) -> dict[str, Any]:
        rendered.append(row["n"])
        return ready(self, row, where)

    monkeypatch.setattr(PromptTokenizer, "ready", counted)
    chats: list[dict[str, Any]] = [{"prompt": [user("a" * (1 + n % 9))], "n": n} for n in range(50)]
    chats.append({"prompt": [user("a" * 490)], "n": 50})
    path = write_rows(tmp_path / "rows.parquet", chats)
    (found,) = ready_rows(path, chat_folder, max_prompt_tokens=512)
    assert (rendered, len(found.rows)) == ([0, 50], 51)
    with pytest.raises(InputError, match=r"rows\.parquet, row 50 has 495 tokens, more than 494"):
        next(ready_rows(path, chat_folder, max_prompt_tokens=494))


def test_an_empty_prompt_is_refused_with_its_row(tmp_path: Path) -> None:
    plain = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=plain).save_pretrained(tmp_path / "plain")
    path = write_rows(tmp_path / "rows.parquet", [{"prompt": "a"}, {"prompt": ""}])
    with pytest.raises(InputError, match=r"rows\.parquet, row 1: the prompt has no tokens"):
        next(ready_rows(path, tmp_path / "plain", max_prompt_tokens=8))
