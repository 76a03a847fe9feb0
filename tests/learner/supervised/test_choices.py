"""Preferences become completions as in supervised fine-tuning: pairs of them, or labelled ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.data.chat_template import render
from cluster.data.invalid_rows import BrokenRows
from cluster.data.rendered_prompts import literals_column
from cluster.data.text_tokens import token_ids
from cluster.errors import InputError
from learner.supervised.choices import Choice, Rated, mismatch, read_choices, read_rated
from learner.supervised.examples import Completion, read_completions, read_pairs
from tests.learner.supervised.test_examples import texts, written
from tests.support.chat import assistant, make_tokenizer, user

TOKENIZER = make_tokenizer()
TEXT = {"prompt": "ab", "chosen": "good", "rejected": "bad"}
MESSAGES = {"prompt": [user("ab")], "chosen": [assistant("good")], "rejected": [assistant("bad")]}
WHOLE = {"chosen": [user("ab"), assistant("good")], "rejected": [user("ab"), assistant("bad")]}


@pytest.mark.parametrize("row", [TEXT, MESSAGES, WHOLE], ids=["texts", "messages", "implicit prompt"])
def test_both_sides_have_the_tokens_of_supervised_fine_tuning(tmp_path: Path, row: dict[str, Any]) -> None:
    (choice,) = read_choices(TOKENIZER, written(tmp_path / "pairs.jsonl", row))
    for side, completion in zip(("chosen", "rejected"), choice.completions, strict=True):
        example = row if "prompt" in row else MESSAGES
        alone = {"prompt": example["prompt"], "completion": example[side]}
        assert [completion] == read_completions(TOKENIZER, written(tmp_path / f"{side}.jsonl", alone))


def test_labelled_rows_become_pairs_for_a_loss_of_pairs(tmp_path: Path) -> None:
    rows = [{"prompt": "ab", "completion": text, "label": label} for text, label in (("no", False), ("yes", True))]
    (choice,) = read_choices(TOKENIZER, written(tmp_path / "rows.jsonl", *rows))
    assert [texts(completion) for completion in choice.completions] == [("<bos>ab", "yes<eos>"), ("<bos>ab", "no<eos>")]


@pytest.mark.parametrize(
    ("prompt", "completion"), [("ab", "no"), ([user("ab")], [assistant("no")])], ids=["texts", "messages"]
)
def test_labelled_rows_stay_single_for_kto(tmp_path: Path, prompt: Any, completion: Any) -> None:
    path = written(tmp_path / "rows.jsonl", {"prompt": prompt, "completion": completion, "label": False})
    (rated,) = read_rated(TOKENIZER, path)
    assert (texts(rated.completion)[1].strip(), rated.is_desirable) == ("no<eos>", False)


def test_pairs_become_all_desirable_then_all_undesirable_rows(tmp_path: Path) -> None:
    path = written(tmp_path / "pairs.jsonl", TEXT, {"prompt": "cd", "chosen": "fine", "rejected": "dull"})
    rated = [(texts(row.completion), row.is_desirable) for row in read_rated(TOKENIZER, path)]
    assert rated == [
        (("<bos>ab", "good<eos>"), True),
        (("<bos>cd", "fine<eos>"), True),
        (("<bos>ab", "bad<eos>"), False),
        (("<bos>cd", "dull<eos>"), False),
    ]


def test_sampled_pairs_of_conversations_have_the_tokens_of_their_prompts(tmp_path: Path) -> None:
    messages = [[user("a <eos> b"), assistant("x"), user("cd")], [user("ab")]]
    prompts = [render(TOKENIZER, each, "row", is_prompt=True) for each in messages]
    sides = {"chosen": ["good", "fine"], "rejected": ["bad", "dull"]}
    table = pa.table({"prompt": list(map(str, prompts)), **sides, **literals_column(prompts)})
    pq.write_table(table, tmp_path / "pairs.parquet")
    expected = token_ids(TOKENIZER, prompts)
    choices = read_choices(TOKENIZER, tmp_path / "pairs.parquet")
    pairs = read_pairs(TOKENIZER, tmp_path / "pairs.parquet")
    for choice, pair, ids in zip(choices, pairs, expected, strict=True):
        assert pair.chosen[: pair.num_prompt] == ids
        for side in choice.completions:
            assert side.token_ids[: side.num_prompt] == ids
        assert choice.chosen.token_ids == pair.chosen
    assert literals_column(["ab"]) == {}


def test_a_row_with_one_broken_side_is_left_out_once(tmp_path: Path) -> None:
    broken_rows = [MESSAGES | {side: [{"role": "assistant", "content": None}]} for side in ("chosen", "rejected")]
    other_start = {"prompt": [user("ab")], "chosen": [assistant("good")], "rejected": [assistant("bad")]}
    path = written(tmp_path / "pairs.jsonl", MESSAGES, *broken_rows, other_start)
    for read in (read_choices, read_rated):
        broken = BrokenRows("skip")
        assert len(read(TOKENIZER, path, None, broken)) == (2 if read is read_choices else 4)
        assert [error.where for error in broken.errors] == [f"{path}, line 2", f"{path}, line 3"]
    with pytest.raises(InputError, match="line 2"):
        read_choices(TOKENIZER, path)


def test_conversations_without_a_common_start_are_named(tmp_path: Path) -> None:
    path = written(tmp_path / "pairs.jsonl", WHOLE, {"chosen": WHOLE["chosen"], "rejected": [user("x"), assistant("")]})
    with pytest.raises(InputError, match="line 2: chosen and rejected have no first message in common"):
        read_choices(TOKENIZER, path)
    assert len(read_choices(TOKENIZER, path, None, BrokenRows("skip"))) == 1


def test_long_completions_are_cut_if_something_to_compare_is_left() -> None:
    long, short = Completion([2, 5, 7, 8, 9], 2), Completion([2, 5, 7, 6], 2)
    choice = Choice(long, short)
    assert choice.num_tokens() == 5
    assert choice.cut(4) == Choice(Completion([2, 5, 7, 8], 2), short)
    assert choice.cut(3) is None, "the rest is equal"
    assert choice.cut(2) is None
    rated = Rated(long, True, long)
    assert rated.cut(3) == Rated(Completion([2, 5, 7], 2), True, Completion([2, 5, 7], 2))
    assert rated.cut(2) is None


def rated_row(prompt: int, answer: int, num_answer: int = 1) -> Rated:
    completion = Completion([2, prompt, *[answer] * num_answer], 2)
    return Rated(completion, True, completion)


def test_a_prompt_is_mismatched_with_the_completion_of_another_prompt() -> None:
    rows = [rated_row(1, 10), rated_row(2, 20), rated_row(2, 21), rated_row(3, 30), rated_row(1, 11)]
    made, num_cut = mismatch(rows, 8)
    assert [row.mismatched.token_ids for row in made] == [[2, 1, 30], [2, 2, 10], [2, 2, 10], [2, 3, 21], [2, 1, 30]]
    assert [row.completion for row in made] == [row.completion for row in rows]
    assert num_cut == 0
    same, _ = mismatch([rated_row(1, 10), rated_row(1, 11)], 8)
    assert [row.mismatched.token_ids for row in same] == [[2, 1, 11], [2, 1, 10]]


def test_a_mismatched_completion_is_cut_to_fit_and_counted() -> None:
    made, num_cut = mismatch([rated_row(1, 10, 3), rated_row(2, 20)], 4)
    assert [row.mismatched for row in made] == [Completion([2, 1, 20], 2), Completion([2, 2, 10, 10], 2)]
    assert num_cut == 1
