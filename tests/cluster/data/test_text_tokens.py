"""Texts become token ids with the special tokens before them, and with one end where one is due."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.data.text_tokens import begun_token_ids, scored_token_ids
from learner.supervised.examples import read_completions, read_pairs
from rollout_actors.prompts import PromptTokenizer
from tests.support.chat import make_tokenizer

EOS, BOS = 1, 2


def ending_tokenizer() -> Any:
    """Return a tokenizer that puts an end of sequence behind every text."""
    from tokenizers import processors

    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        "<bos> $A <eos>", special_tokens=[("<bos>", BOS), ("<eos>", EOS)]
    )
    return tokenizer


def plain(text: str) -> list[int]:
    ids: list[int] = make_tokenizer()(text, add_special_tokens=False)["input_ids"]
    return ids


def written(path: Path, row: dict[str, Any]) -> Path:
    path.write_text(json.dumps(row) + "\n")
    return path


def test_a_text_to_be_continued_gets_no_end_from_the_tokenizer(tmp_path: Path) -> None:
    tokenizer = ending_tokenizer()
    assert tokenizer("ab")["input_ids"] == [BOS, *plain("ab"), EOS]
    assert begun_token_ids(tokenizer, ["ab", ""]) == [[BOS, *plain("ab")], [BOS]]
    tokenizer.save_pretrained(tmp_path / "model")
    assert PromptTokenizer(str(tmp_path / "model"), max_prompt_tokens=9).encode(["ab"]) == [[BOS, *plain("ab")]]
    (example,) = read_completions(tokenizer, written(tmp_path / "a.jsonl", {"prompt": "ab", "completion": "cd"}))
    assert example == ([BOS, *plain("abcd"), EOS], 3)


def test_an_end_that_a_plain_prompt_spells_is_kept() -> None:
    assert begun_token_ids(ending_tokenizer(), ["ab<eos>"]) == [[BOS, *plain("ab"), EOS]]


@pytest.mark.parametrize("tokenizer", [make_tokenizer(), ending_tokenizer()], ids=["begins", "begins and ends"])
@pytest.mark.parametrize("end", ["", "<eos>", "<eos>\n", "<eos><eos>"])
def test_completion_and_response_have_one_end(tmp_path: Path, tokenizer: Any, end: str) -> None:
    whole = [BOS, *plain("abcd"), EOS]
    (example,) = read_completions(tokenizer, written(tmp_path / "a.jsonl", {"prompt": "ab", "completion": "cd" + end}))
    assert example == (whole, 3)
    row = {"prompt": "ab", "chosen": "cd" + end, "rejected": "e" + end}
    (pair,) = read_pairs(tokenizer, written(tmp_path / "b.jsonl", row))
    assert (pair.chosen, pair.rejected, pair.num_prompt) == (whole, [BOS, *plain("abe"), EOS], 3)
    assert scored_token_ids(tokenizer, ["ab", "<bos>ab"], ["cd" + end] * 2) == [whole, whole]
