"""Reads preferences as the policy writes them: completions that are chosen and rejected, or desirable and not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from cluster.data.chat_template import Message, split_common
from cluster.data.datasets import PAIR, Examples, Form, read_examples
from cluster.data.invalid_rows import BrokenRows
from cluster.data.rendered_prompts import LITERALS, with_rendered_prompts
from cluster.errors import InputError
from learner.supervised.examples import Completion, completions_of

PROMPT_AND_COMPLETION = ("prompt", "completion")
T = TypeVar("T")


class Choice(NamedTuple):
    """Two completions of a prompt, the better one first.

    `reference` are their log-probabilities under the reference policy.
    """

    chosen: Completion
    rejected: Completion
    reference: tuple[float, float] = (0.0, 0.0)

    @property
    def completions(self) -> tuple[Completion, Completion]:
        """The completions whose log-probabilities are computed."""
        return self.chosen, self.rejected

    def num_tokens(self) -> int:
        """Return the number of tokens of the longer one."""
        return max(self.chosen.num_tokens(), self.rejected.num_tokens())

    def cut(self, max_tokens: int) -> Choice | None:
        """Cut both completions to fit; returns None if no token fits or the rest is equal."""
        chosen, rejected = self.chosen.cut(max_tokens), self.rejected.cut(max_tokens)
        if chosen is None or rejected is None or chosen == rejected:
            return None
        return self._replace(chosen=chosen, rejected=rejected)


class Rated(NamedTuple):
    """A completion that is desirable or not.

    `mismatched` is another prompt's completion behind this prompt, with which KTO estimates the KL. `reference` are the
    log-probabilities of both under the reference policy.
    """

    completion: Completion
    is_desirable: bool
    mismatched: Completion
    reference: tuple[float, float] = (0.0, 0.0)

    @property
    def completions(self) -> tuple[Completion, Completion]:
        """The completions whose log-probabilities are computed."""
        return self.completion, self.mismatched

    def num_tokens(self) -> int:
        """Return the number of tokens; a mismatched completion is cut to fit."""
        return self.completion.num_tokens()

    def cut(self, max_tokens: int) -> Rated | None:
        """Cut the completion to fit; returns None if none of its tokens fits."""
        completion = self.completion.cut(max_tokens)
        return completion and self._replace(completion=completion, mismatched=completion)


def read_choices(
    tokenizer: Any, path: Path, columns: Mapping[str, str] | None = None, broken: BrokenRows | None = None
) -> list[Choice]:
    """Read the pairs of a data set of preferences.

    Raises InputError naming the file, and the column or row, that is wrong; `broken` may skip rows.
    """
    broken = broken or BrokenRows()
    examples = read_examples(path, "preferences", others=("tools", LITERALS), columns=columns, broken=broken)
    return _choices(tokenizer, examples, path, broken)


def read_rated(
    tokenizer: Any, path: Path, columns: Mapping[str, str] | None = None, broken: BrokenRows | None = None
) -> list[Rated]:
    """Read labelled completions, or pairs, whose chosen completions are desirable and whose rejected ones are not.

    Raises InputError naming the file, and the column or row, that is wrong; `broken` may skip rows.
    """
    broken = broken or BrokenRows()
    examples = read_examples(
        path, "preferences", others=("tools", LITERALS), columns=columns, broken=broken, paired=False
    )
    if "label" not in examples.form.columns:
        pairs = _choices(tokenizer, examples, path, broken)
        sides = ((pair.chosen, True) for pair in pairs), ((pair.rejected, False) for pair in pairs)
        return [Rated(completion, is_desirable, completion) for side in sides for completion, is_desirable in side]
    labels, completions = examples.columns["label"], _of_prompts(examples, examples.columns["completion"])
    tokenized = completions_of(tokenizer, completions, path, broken)
    return _some([Rated(each, labels[row], each) for row, each in tokenized.items()], path, broken)


def _choices(tokenizer: Any, examples: Examples, path: Path, broken: BrokenRows) -> list[Choice]:
    """Tokenize pairs. A row whose chosen completion is broken is not reported twice."""
    pairs = _with_prompt(examples, path, broken)
    chosen = _side(tokenizer, pairs, "chosen", range(len(pairs)), path, broken)
    rejected = _side(tokenizer, pairs, "rejected", list(chosen), path, broken)
    return _some([Choice(chosen[row], each) for row, each in rejected.items()], path, broken)


def _some(rows: list[T], path: Path, broken: BrokenRows) -> list[T]:
    """Return the rows. Raises InputError if all were skipped."""
    if not rows:
        raise InputError(str(path), f"all {len(broken.errors)} rows are broken; {broken.errors[0]}")
    return rows


def _with_prompt(examples: Examples, path: Path, broken: BrokenRows) -> Examples:
    """Return the pairs with a column `prompt`; if they have none, it is their common first messages."""
    if "prompt" in examples.form.columns:
        return with_rendered_prompts(examples)
    rows, parts = list[int](), list[tuple[list[Message], ...]]()
    for row, sides in enumerate(zip(examples.columns["chosen"], examples.columns["rejected"], strict=True)):
        with broken.row():
            parts.append(split_common(*sides, examples.where(row)))
            rows.append(row)
    columns = dict(zip(PAIR, map(list, zip(*_some(parts, path, broken), strict=True)), strict=True))
    taken = examples.taken(rows)
    return Examples(Form(PAIR, conversational=True), columns | _tools(taken), taken.numbers, taken.places)


def _tools(examples: Examples) -> dict[str, list[Any]]:
    return {name: values for name, values in examples.columns.items() if name == "tools"}


def _of_prompts(examples: Examples, completions: Sequence[Any]) -> Examples:
    """Return the examples' prompts with these completions."""
    form = Form(PROMPT_AND_COMPLETION, examples.form.conversational)
    columns = {"prompt": examples.columns["prompt"], "completion": list(completions), **_tools(examples)}
    return Examples(form, columns, examples.numbers, examples.places)


def _side(
    tokenizer: Any, examples: Examples, column: str, rows: Sequence[int], path: Path, broken: BrokenRows
) -> dict[int, Completion]:
    """Tokenize the chosen or the rejected completions of these rows, by row."""
    taken = examples.taken(rows)
    completions = completions_of(tokenizer, _of_prompts(taken, taken.columns[column]), path, broken)
    return {rows[place]: completion for place, completion in completions.items()}


def mismatch(rows: Sequence[Rated], max_tokens: float) -> tuple[list[Rated], int]:
    """Put each prompt before the completion of the last row before it that has another prompt.

    The first rows take those of the last rows. If all rows have one prompt, the row before is taken. Returns the rows
    and how many of these sequences were cut to `max_tokens`.
    """
    prompts = [tuple(row.completion.token_ids[: row.completion.num_prompt]) for row in rows]
    others, num_cut, made = _rows_before(prompts), 0, list[Rated]()
    for row, prompt, other in zip(rows, prompts, others, strict=True):
        source = rows[other].completion
        token_ids = [*prompt, *source.token_ids[source.num_prompt :]]
        num_cut += len(token_ids) > max_tokens
        kept = token_ids[: int(max_tokens)] if len(token_ids) > max_tokens else token_ids
        made.append(row._replace(mismatched=Completion(kept, len(prompt))))
    return made, num_cut


def _rows_before(prompts: Sequence[tuple[int, ...]]) -> list[int]:
    """Return for each row the last row before it, in a circle, with another prompt, or the row before."""
    starts = {row for row in range(len(prompts)) if prompts[row] != prompts[row - 1]}
    if not starts:
        return [(row - 1) % len(prompts) for row in range(len(prompts))]
    others, start = list[int](), max(starts)
    for row in range(len(prompts)):
        start = row if row in starts else start
        others.append((start - 1) % len(prompts))
    return others
