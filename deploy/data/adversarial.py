"""Make prompts harder without changing the right answer: typos, distractors, paraphrases and injections.

Works on texts and tables only. All random choices follow from the seed and the row's index.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from cluster import user_code
from cluster.data.unicode_text import is_unicode
from cluster.errors import InputError
from cluster.files import replacing
from deploy.config.schema import AdversarialConfig, Way

Row = Mapping[str, Any]
Change = Callable[[str, random.Random], str]
SENTENCE_END = re.compile(r"(?<=[.?!])\s+")
WORD = re.compile(r"[^\W\d_]{4,}")
"""Words that may get a typo: four letters or more."""


class Paraphrases(Protocol):
    """The function that `adversarial.paraphrase` names."""

    def __call__(self, text: str, /, *, seed: int) -> str: ...


def altered_rows(rows: Sequence[Row], config: AdversarialConfig, *, seed: str, share: float = 1.0) -> list[Row]:
    """Return the rows, with a share of the prompts altered: by each way in turn if all are, else by a random way.

    In a conversation the user's last message is altered. Raises InputError if a paraphrase is not text.
    """
    changes = {way: _change(way, config) for way in config.ways}
    altered = []
    for index, row in enumerate(rows):
        draw = random.Random(f"{seed}:{index}")
        is_altered = draw.random() < share
        way = way_of(index, config.ways) if share == 1.0 else draw.choice(config.ways)
        altered.append(_altered(row, changes[way], draw) if is_altered else row)
    return altered


def way_of(index: int, ways: Sequence[Way]) -> Way:
    """Return the way in which a row's prompt is altered if all prompts are."""
    return ways[index % len(ways)]


def write_altered(rows: Sequence[Row], path: Path, config: AdversarialConfig, *, seed: str, share: float = 1.0) -> None:
    """Write the altered rows as JSON Lines, atomically; each row keeps its own keys."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row, ensure_ascii=False) for row in altered_rows(rows, config, seed=seed, share=share)]
    with replacing(path) as partial:
        Path(partial).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _altered(row: Row, change: Callable[[str, random.Random, Row], str], draw: random.Random) -> Row:
    prompt = row["prompt"]
    if isinstance(prompt, str):
        return {**row, "prompt": change(prompt, draw, row)}
    last = max(
        (i for i, message in enumerate(prompt) if message["role"] == "user" and message.get("content")), default=None
    )
    if last is None:
        return row
    message = {**prompt[last], "content": change(prompt[last]["content"], draw, row)}
    return {**row, "prompt": [*prompt[:last], message, *prompt[last + 1 :]]}


def _change(way: Way, config: AdversarialConfig) -> Callable[[str, random.Random, Row], str]:
    if way == "typos":
        return partial(_with_typos, share=config.typo_share)
    if way == "paraphrase":
        assert config.paraphrase is not None
        return partial(_paraphrased, user_code.load(config.paraphrase, "adversarial.paraphrase"), config.paraphrase)
    return partial(_with_sentence, config.distractors if way == "distractor" else config.injections)


def _paraphrased(function: Paraphrases, name: str, text: str, draw: random.Random, row: Row) -> str:
    found = function(text, seed=draw.getrandbits(32))
    if not isinstance(found, str) or not found.strip() or not is_unicode(found):
        what = f"{name} returned {found!r} for {text!r}: it must return a non-empty text in Unicode"
        raise InputError("adversarial.paraphrase", what)
    return found


def _with_sentence(sentences: Sequence[str], text: str, draw: random.Random, row: Row) -> str:
    """Insert one of the sentences before a sentence of the text; the question stays last."""
    parts = SENTENCE_END.split(text)
    place = draw.randrange(len(parts))
    return " ".join([*parts[:place], draw.choice(sentences), *parts[place:]])


def _with_typos(text: str, draw: random.Random, row: Row, *, share: float) -> str:
    """Add typos to a share of the words, at least one; skip words of other columns, which may be the answer."""
    kept = set(_words_of({name: value for name, value in row.items() if name != "prompt"}))
    spans = [match.span() for match in WORD.finditer(text) if match.group().casefold() not in kept]
    hit = draw.sample(spans, min(len(spans), max(1, round(share * len(spans)))))
    for start, end in sorted(hit, reverse=True):
        text = text[:start] + _misspelled(text[start:end], draw) + text[end:]
    return text


def _misspelled(word: str, draw: random.Random) -> str:
    """Swap two adjacent inner letters; if all are equal, leave one out."""
    places = [i for i in range(1, len(word) - 2) if word[i] != word[i + 1]]
    if not places:
        return word[0] + word[2:]
    place = draw.choice(places)
    return word[:place] + word[place + 1] + word[place] + word[place + 2 :]


def _words_of(value: Any) -> Iterator[str]:
    """Yield every word in a value, at any depth."""
    yield from (match.group().casefold() for match in WORD.finditer(json.dumps(value, default=str, ensure_ascii=False)))
