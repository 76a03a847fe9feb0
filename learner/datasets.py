"""What the supervised stages train on: rows of a data set as token ids, the long ones cut or dropped as it is asked.

Knows neither models nor losses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, Self, TypeVar

from cluster.chat_template import (
    Message,
    completion_after,
    render,
    require_template,
    scored_token_ids,
    split_at_last_answer,
    split_common,
    token_ids,
)
from cluster.datasets import read_columns
from cluster.errors import InputError

END_MARK = "\ue000"
"""A character of Unicode's private use area, which no text should have."""


class Completion(NamedTuple):
    """A prompt with its completion: the ids of all tokens, and how many of them are the prompt's."""

    token_ids: list[int]
    num_prompt: int

    def num_tokens(self) -> int:
        return len(self.token_ids)

    def cut(self, max_tokens: int) -> Completion | None:
        """The prompt and as much of the completion as fits; None where nothing of it does."""
        return self._replace(token_ids=self.token_ids[:max_tokens]) if self.num_prompt < max_tokens else None


class Pair(NamedTuple):
    """Two responses to a prompt, each as the ids of prompt and response; `margin` is how far apart they should be."""

    chosen: list[int]
    rejected: list[int]
    num_prompt: int = 0
    margin: float = 0.0

    def num_tokens(self) -> int:
        """Tokens of the longer one."""
        return max(len(self.chosen), len(self.rejected))

    def cut(self, max_tokens: int) -> Pair | None:
        """Both with as much of the response as fits; None where nothing fits or nothing is left to tell them apart."""
        chosen, rejected = self.chosen[:max_tokens], self.rejected[:max_tokens]
        if self.num_prompt >= max_tokens or chosen == rejected:
            return None
        return self._replace(chosen=chosen, rejected=rejected)


class Example(Protocol):
    """What a limit is applied to."""

    def num_tokens(self) -> int: ...
    def cut(self, max_tokens: int) -> Self | None: ...


E = TypeVar("E", bound=Example)


@dataclass(frozen=True, slots=True)
class Limit:
    """How many tokens an example may have, why, and what becomes of a longer one."""

    max_tokens: float
    why: str
    long_examples: Literal["error", "drop", "cut"]

    @classmethod
    def of(cls, model: Any, config: Any, section: str) -> Limit:
        """The limit that a section of the run file sets, or without one the model's context.

        Raises InputError when the section allows more than the context.
        """
        context = getattr(model.config, "max_position_embeddings", None) or math.inf
        if config.max_tokens is None:
            return cls(context, f"the model's context is {context}", config.long_examples)
        if config.max_tokens > context:
            raise InputError(f"{section}.max_tokens", f"{config.max_tokens}, but the model's context is {context}")
        return cls(config.max_tokens, f"{section}.max_tokens is {config.max_tokens}", config.long_examples)

    def applied(self, examples: Sequence[E], path: Path) -> tuple[list[E], dict[str, float]]:
        """The examples that are kept, and how many there are, were cut and were dropped.

        Raises InputError naming the first row that is too long where that is an error, and where none is left.
        """
        kept: list[E] = []
        num_cut = 0
        for row, example in enumerate(examples):
            if example.num_tokens() <= self.max_tokens:
                kept.append(example)
            elif self.long_examples == "error":
                raise InputError(str(path), f"row {row}: {example.num_tokens()} tokens, but {self.why}")
            elif self.long_examples == "cut" and (short := example.cut(int(self.max_tokens))) is not None:
                kept.append(short)
                num_cut += 1
        if not kept:
            raise InputError(str(path), f"all {len(examples)} examples were dropped as too long: {self.why}")
        num_dropped = len(examples) - len(kept)
        return kept, {"num_examples": len(kept), "num_cut": num_cut, "num_dropped": num_dropped}


def read_completions(tokenizer: Any, path: Path) -> list[Completion]:
    """The examples of a data set of prompts and completions.

    Raises InputError naming the file, and the column or row, that is wrong.
    """
    form, columns = read_columns(path, "sft")
    if not form.conversational:
        return tokenize(tokenizer, columns["prompt"], columns["completion"])
    require_template(tokenizer, str(path))
    if form.columns == ("messages",):
        halves = [split_at_last_answer(row, _row(path, i)) for i, row in enumerate(columns["messages"])]
    else:
        halves = list(zip(columns["prompt"], columns["completion"], strict=True))
    return _tokenize_conversations(tokenizer, path, halves)


def _row(path: Path, index: int) -> str:
    return f"{path}, row {index}"


def tokenize(tokenizer: Any, prompts: Sequence[str], completions: Sequence[str]) -> list[Completion]:
    """Each row's token ids, prompt then completion then end of sequence, with the length of its prompt."""
    prompt_ids = tokenizer(list(prompts)).input_ids
    completion_ids = tokenizer(list(completions), add_special_tokens=False).input_ids
    return [
        Completion([*prompt, *completion, tokenizer.eos_token_id], len(prompt))
        for prompt, completion in zip(prompt_ids, completion_ids, strict=True)
    ]


def _tokenize_conversations(
    tokenizer: Any, path: Path, halves: Sequence[tuple[list[Message], list[Message]]]
) -> list[Completion]:
    """The same of conversations: what the chat template writes, with an end of sequence where it writes none."""
    prompts = [render(tokenizer, half, _row(path, i), is_prompt=True) for i, (half, _) in enumerate(halves)]
    wholes = [render(tokenizer, [*a, *b], _row(path, i), is_prompt=False) for i, (a, b) in enumerate(halves)]
    examples = []
    pairs = zip(token_ids(tokenizer, prompts), token_ids(tokenizer, wholes), strict=True)
    for index, (prompt, whole) in enumerate(pairs):
        completion = completion_after(prompt, whole, _row(path, index))
        end = [] if tokenizer.eos_token_id in completion else [tokenizer.eos_token_id]
        examples.append(Completion([*whole, *end], len(prompt)))
    return examples


def read_pairs(tokenizer: Any, path: Path) -> list[Pair]:
    """The pairs of a data set of preferences, prompt + response + end of sequence read as what serves them reads it.

    Raises InputError naming the file, and the column or row, that is wrong.
    """
    form, columns = read_columns(path, "preferences", others=("margin",))
    if form.conversational:
        texts = _rendered_pairs(tokenizer, path, columns)
    else:
        texts = [columns[name] for name in form.columns]
    prompts, chosen, rejected = texts
    whole = [
        scored_token_ids(tokenizer, [p + r + tokenizer.eos_token for p, r in zip(prompts, responses, strict=True)])
        for responses in (chosen, rejected)
    ]
    num_prompt = [len(ids) for ids in scored_token_ids(tokenizer, prompts)]
    margins = _margins(path, columns.get("margin", [0.0] * len(prompts)))
    return [Pair(*row) for row in zip(*whole, num_prompt, margins, strict=True)]


def _margins(path: Path, values: Sequence[Any]) -> list[float]:
    for index, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise InputError(str(path), f"column 'margin', row {index}: not a number but {value!r}")
    return [float(value) for value in values]


def _rendered_pairs(tokenizer: Any, path: Path, columns: dict[str, list[Any]]) -> list[list[str]]:
    """Prompts, chosen and rejected responses as texts."""
    require_template(tokenizer, str(path))
    texts: list[list[str]] = [[], [], []]
    for index, (chosen, rejected) in enumerate(zip(columns["chosen"], columns["rejected"], strict=True)):
        where = _row(path, index)
        if "prompt" in columns:
            prompt = columns["prompt"][index]
        else:
            prompt, chosen, rejected = split_common(chosen, rejected, where)
        text = render(tokenizer, prompt, where, is_prompt=True)
        texts[0].append(text)
        texts[1].append(_response(tokenizer, prompt, text, chosen, where))
        texts[2].append(_response(tokenizer, prompt, text, rejected, where))
    return texts


def _response(
    tokenizer: Any, prompt: Sequence[Message], prompt_text: str, messages: Sequence[Message], where: str
) -> str:
    """A response as text, as the policy would give it: the template's, up to the end of its last message's content.

    Where that is, a mark put there shows.
    """
    last = {**messages[-1], "content": messages[-1]["content"].rstrip() + END_MARK}
    whole = render(tokenizer, [*prompt, *messages], where, is_prompt=False)
    marked = render(tokenizer, [*prompt, *messages[:-1], last], where, is_prompt=False)
    before, mark, _ = marked.partition(END_MARK)
    if not mark or not whole.startswith(before):
        raise InputError(where, "the chat template does not write the end of the last message as it stands")
    return str(completion_after(prompt_text, before, where))
