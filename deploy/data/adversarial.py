"""Prompts made harder whose right answers stay what they are: slips of the pen, asides, other words, false orders.

Works on texts and tables alone; knows neither policies nor rewards. All that is random follows from the seed and the
row's place.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from cluster import user_code
from cluster.errors import InputError
from cluster.files import replacing
from deploy.config.schema import AdversarialConfig, Way

Row = Mapping[str, Any]
Change = Callable[[str, random.Random], str]
SENTENCE_END = re.compile(r"(?<=[.?!])\s+")
WORD = re.compile(r"[^\W\d_]{4,}")
"""What a slip of the pen may be in: a word of four letters or more."""


class Paraphrases(Protocol):
    """What `adversarial.paraphrase` names."""

    def __call__(self, text: str, /, *, seed: int) -> str: ...


def altered_rows(rows: Sequence[Row], config: AdversarialConfig, *, seed: str, share: float = 1.0) -> list[Row]:
    """The rows, that share of them with their prompt altered: in each of the ways in turn where all are, else in one
    that is drawn.

    Of a conversation the last message of the user's is altered. Raises InputError where the paraphrases are no text.
    """
    changes = {way: _change(way, config) for way in config.ways}
    given = []
    for index, row in enumerate(rows):
        draw = random.Random(f"{seed}:{index}")
        is_altered = draw.random() < share
        way = way_of(index, config.ways) if share == 1.0 else draw.choice(config.ways)
        given.append(_altered(row, changes[way], draw) if is_altered else row)
    return given


def way_of(index: int, ways: Sequence[Way]) -> Way:
    """In which way the prompt of that row is altered where all are."""
    return ways[index % len(ways)]


def write_altered(rows: Sequence[Row], path: Path, config: AdversarialConfig, *, seed: str, share: float = 1.0) -> None:
    """The altered rows as a data set; it appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        pq.write_table(pa.Table.from_pylist(altered_rows(rows, config, seed=seed, share=share)), partial)


def _altered(row: Row, change: Callable[[str, random.Random, Row], str], draw: random.Random) -> Row:
    prompt = row["prompt"]
    if isinstance(prompt, str):
        return {**row, "prompt": change(prompt, draw, row)}
    last = max((i for i, message in enumerate(prompt) if message["role"] == "user"), default=None)
    if last is None:
        return row
    said = {**prompt[last], "content": change(prompt[last]["content"], draw, row)}
    return {**row, "prompt": [*prompt[:last], said, *prompt[last + 1 :]]}


def _change(way: Way, config: AdversarialConfig) -> Callable[[str, random.Random, Row], str]:
    if way == "typos":
        return partial(_with_typos, share=config.typo_share)
    if way == "paraphrase":
        assert config.paraphrase is not None
        return partial(_paraphrased, user_code.load(config.paraphrase, "adversarial.paraphrase"), config.paraphrase)
    return partial(_with_sentence, config.distractors if way == "distractor" else config.injections)


def _paraphrased(function: Paraphrases, name: str, text: str, draw: random.Random, row: Row) -> str:
    found = function(text, seed=draw.getrandbits(32))
    if not isinstance(found, str) or not found.strip():
        raise InputError("adversarial.paraphrase", f"{name} gave {found!r} for {text!r}: a text is wanted")
    return found


def _with_sentence(sentences: Sequence[str], text: str, draw: random.Random, row: Row) -> str:
    """One of the sentences before one of the text's: what is asked is the last still."""
    parts = SENTENCE_END.split(text)
    place = draw.randrange(len(parts))
    return " ".join([*parts[:place], draw.choice(sentences), *parts[place:]])


def _with_typos(text: str, draw: random.Random, row: Row, *, share: float) -> str:
    """Slips in that share of the words, one at least, but in none that another column has: it may be the answer."""
    kept = set(_words_of({name: value for name, value in row.items() if name != "prompt"}))
    spans = [match.span() for match in WORD.finditer(text) if match.group().casefold() not in kept]
    hit = draw.sample(spans, min(len(spans), max(1, round(share * len(spans)))))
    for start, end in sorted(hit, reverse=True):
        text = text[:start] + _slipped(text[start:end], draw) + text[end:]
    return text


def _slipped(word: str, draw: random.Random) -> str:
    """Two neighbours inside it in the wrong order; where all are alike, one is missing."""
    places = [i for i in range(1, len(word) - 2) if word[i] != word[i + 1]]
    if not places:
        return word[0] + word[2:]
    place = draw.choice(places)
    return word[:place] + word[place + 1] + word[place] + word[place + 2 :]


def _words_of(value: Any) -> Iterator[str]:
    """Every word in a value, however deep it is."""
    yield from (match.group().casefold() for match in WORD.finditer(json.dumps(value, default=str, ensure_ascii=False)))
