"""Responses keep the tokens that carry meaning, and their text is what follows the context."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from cluster.data.control_tokens import RenderedPrompt
from cluster.data.text_tokens import continued_token_ids, scored_token_ids
from rollout_actors.prompts import PromptTokenizer
from rollout_actors.response_text import ResponseText
from tests.support.chat import make_tokenizer

PAD, EOS, BOS, UNK, USER = range(5)


def ids(text: str) -> list[int]:
    found: list[int] = make_tokenizer()(text, add_special_tokens=False)["input_ids"]
    return found


@pytest.mark.parametrize(
    ("keep", "text"), [(True, "a<unk>[user]b"), (False, "ab"), (("[user]",), "a[user]b"), (("<eos>",), "ab<eos>")]
)
def test_special_tokens_stay_as_set(keep: bool | tuple[str, ...], text: str) -> None:
    sampled = [BOS, *ids("a"), UNK, USER, *ids("b"), EOS, PAD]
    assert ResponseText(make_tokenizer(), {EOS}, keep).decode(sampled) == text


def test_stop_tokens_of_the_generation_config_are_left_out(tmp_path: Path) -> None:
    make_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 4]}')
    tokenizer = PromptTokenizer(str(tmp_path), max_prompt_tokens=9)
    assert tokenizer.end_ids == {EOS, USER}
    assert tokenizer.decode([[*ids("ab"), USER], [*ids("ab"), EOS]]) == ["ab", "ab"]


def test_a_response_of_unknown_tokens_is_visible() -> None:
    assert ResponseText(make_tokenizer(), {EOS}).decode([UNK, UNK, EOS]) == "<unk><unk>"


def test_sampled_special_tokens_differ_from_spelled_ones() -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(list("[]<>"))
    spelled: list[int] = tokenizer.convert_tokens_to_ids(list("[user]"))
    text = ResponseText(tokenizer, {EOS}).decode([*ids("a"), USER, *spelled, USER, EOS])
    assert text == "a[user][user][user]"
    assert isinstance(text, RenderedPrompt)
    assert text.literals == ((7, 13),)
    (scored,) = scored_token_ids(tokenizer, [RenderedPrompt("<bos>b")], [text])
    assert scored == [BOS, *ids("ba"), USER, *spelled, USER, EOS]


def sentencepiece_tokenizer() -> Any:
    """Return a tokenizer that writes spaces into its pieces and puts one before a text, as SentencePiece does."""
    words = ["<unk>", "<s>", "</s>", "▁", "▁a", "▁b", "a", "b", ".", "\n"]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("▁", "a"), ("▁", "b")], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]  # type: ignore[list-item]
    )
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in ("<unk>", "<s>", "</s>")])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def test_a_response_keeps_its_leading_space_behind_a_context() -> None:
    tokenizer = sentencepiece_tokenizer()
    text = ResponseText(tokenizer, {2})
    a, b = 4, 5
    assert text.decode([b, a, 2], [1, a]) == " b a"
    assert text.decode([b, a, 2], [1]) == text.decode([b, a, 2]) == "b a"
    assert text.decode([7], [1, a]) == "b"


def test_a_continuation_gets_no_space_that_its_text_lacks() -> None:
    tokenizer = sentencepiece_tokenizer()
    texts = [RenderedPrompt(text) for text in ("b", " b", "", "b a")]
    assert continued_token_ids(tokenizer, texts) == [[7], [5], [], [7, 4]]
    assert tokenizer("b", add_special_tokens=False)["input_ids"] == [5]
