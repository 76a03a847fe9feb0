"""The bound of a prompt's tokens is never below their number, for all kinds of tokenizers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from rollout_actors.token_bound import TokenBound

BYTES = {byte: number for number, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
LETTERS = {"<unk>": 0, "<s>": 1, "\u2581": 2, **{chr(97 + i): 3 + i for i in range(26)}}


def byte_level(normalizer: Any = None, **settings: Any) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(BYTES, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(**settings)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    return tokenizer


def sentencepiece() -> Tokenizer:
    vocabulary = LETTERS | {f"<0x{i:02X}>": 100 + i for i in range(256)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.decoder = decoders.ByteFallback()
    return tokenizer


def unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram([(word, -1.0) for word in LETTERS], unk_id=0, byte_fallback=False))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    return tokenizer


TOKENIZERS = {
    "byte_level": byte_level(add_prefix_space=False),
    "prefix_space": byte_level(add_prefix_space=True),
    "nfkd": byte_level(normalizers.NFKD(), add_prefix_space=True),
    "lowercase": byte_level(normalizers.Lowercase(), add_prefix_space=False),
    "sentencepiece": sentencepiece(),
    "unigram": unigram(),
}


def bound_of(folder: Path, tokenizer: Tokenizer) -> TokenBound:
    tokenizer.save(str(folder / "tokenizer.json"))
    return TokenBound(folder)


@pytest.fixture(scope="module")
def bounds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TokenBound]:
    return {name: bound_of(tmp_path_factory.mktemp(name), tokenizer) for name, tokenizer in TOKENIZERS.items()}


@given(st.sampled_from(sorted(TOKENIZERS)), st.text() | st.text("\ufdfa\u0130 \u1e9eab\U0001d160", max_size=20))
def test_no_text_has_more_tokens_than_the_bound(bounds: dict[str, TokenBound], name: str, text: str) -> None:
    assert len(TOKENIZERS[name].encode(text).ids) <= bounds[name].of(text)


def test_the_bound_of_plain_bytes_is_their_number(bounds: dict[str, TokenBound]) -> None:
    assert bounds["byte_level"].of("abc def") == 7
    assert bounds["sentencepiece"].of("abc") == 3 + len("\u2581".encode()) + 1


def test_a_bound_is_infinite_if_a_part_is_unknown(tmp_path: Path) -> None:
    assert TokenBound(tmp_path).of("a") == float("inf")
    growing = byte_level(normalizers.Replace("a", "aaaa"), add_prefix_space=False)
    assert bound_of(tmp_path, growing).of("a") == float("inf")
    settings = json.loads((tmp_path / "tokenizer.json").read_text())
    for part, kind in (("normalizer", "New"), ("post_processor", "New")):
        (tmp_path / "tokenizer.json").write_text(json.dumps(settings | {"normalizer": None, part: {"type": kind}}))
        assert TokenBound(tmp_path).of("a") == float("inf")
