"""Reads the examples of the supervised stages as token ids, and cuts or drops the long ones."""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, Self, TypeVar

from cluster.data.answer_spans import answer_token_spans, end_of_text
from cluster.data.as_messages import as_conversations
from cluster.data.chat_settings import answer_ends, settings_of
from cluster.data.chat_template import (
    Message,
    RenderedPrompt,
    completion_after,
    ends_its_answers,
    render,
    rendered_halves,
    rendered_whole,
    require_template,
    split_at_last_answer,
    split_common,
)
from cluster.data.datasets import Examples, read_examples
from cluster.data.invalid_rows import BrokenRows
from cluster.data.rendered_prompts import LITERALS, are_rendered, with_rendered_prompts
from cluster.data.text_tokens import (
    as_text,
    begun_token_ids,
    continued_token_ids,
    scored_token_ids,
    token_ids,
    whole_token_ids,
    without_end,
)
from cluster.data.tool_calls import require_tools_written, with_objects
from cluster.errors import InputError

END_MARK = "\ue000"
"""A character of Unicode's private use area, which texts should not contain."""


class Completion(NamedTuple):
    """A prompt with its completion: all token ids, and the number of the prompt's tokens.

    `earlier` are the model's answers in the prompt that are trained too, each from its first token to the one behind
    its last.
    """

    token_ids: list[int]
    num_prompt: int
    earlier: tuple[tuple[int, int], ...] = ()

    def num_tokens(self) -> int:
        return len(self.token_ids)

    def cut(self, max_tokens: int) -> Completion | None:
        """Cut the end to fit; returns None if no token that is trained fits."""
        num_prompt = min(self.num_prompt, max_tokens)
        earlier = tuple((start, min(end, max_tokens)) for start, end in self.earlier if start < max_tokens)
        if num_prompt == max_tokens and not earlier:
            return None
        return self._replace(token_ids=self.token_ids[:max_tokens], num_prompt=num_prompt, earlier=earlier)


class Pair(NamedTuple):
    """Two responses to a prompt, each as token ids of prompt and response.

    `margin` is the least difference that their rewards should have, `draw` is `draw_of` the prompt.
    """

    chosen: list[int]
    rejected: list[int]
    num_prompt: int = 0
    margin: float = 0.0
    draw: float = 0.0

    def num_tokens(self) -> int:
        """Return the number of tokens of the longer one."""
        return max(len(self.chosen), len(self.rejected))

    def cut(self, max_tokens: int) -> Pair | None:
        """Cut both responses to fit; returns None if no token fits or the rest is equal."""
        chosen, rejected = self.chosen[:max_tokens], self.rejected[:max_tokens]
        if self.num_prompt >= max_tokens or chosen == rejected:
            return None
        return self._replace(chosen=chosen, rejected=rejected)


class Example(Protocol):
    """An example that a limit can be applied to."""

    def num_tokens(self) -> int: ...
    def cut(self, max_tokens: int) -> Self | None: ...


E = TypeVar("E", bound=Example)
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Limit:
    """The most tokens that an example may have, the reason, and the treatment of longer ones."""

    max_tokens: float
    why: str
    long_examples: Literal["error", "drop", "cut"]

    @classmethod
    def of(cls, model: Any, config: Any, section: str) -> Limit:
        """Return the limit that a section of the run file sets, by default the model's context.

        Raises InputError if the section allows more than the context.
        """
        context = getattr(model.config, "max_position_embeddings", None) or math.inf
        if config.max_tokens is None:
            return cls(context, f"the model's context is {context}", config.long_examples)
        if config.max_tokens > context:
            raise InputError(f"{section}.max_tokens", f"{config.max_tokens}, but the model's context is {context}")
        return cls(config.max_tokens, f"{section}.max_tokens is {config.max_tokens}", config.long_examples)

    def applied(self, examples: Sequence[E], path: Path) -> tuple[list[E], dict[str, float]]:
        """Return the examples to keep, and the numbers of those kept, cut and dropped.

        Raises InputError naming the first row that is too long if that is an error, and if no example is left.
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


def read_completions(
    tokenizer: Any,
    path: Path,
    columns: Mapping[str, str] | None = None,
    broken: BrokenRows | None = None,
    *,
    train_on: Literal["assistant", "last"] = "assistant",
) -> list[Completion]:
    """Read the examples of a data set of prompts and completions.

    Of conversations, every answer is trained, or only the last one, as `train_on` says.

    Raises InputError naming the file, and the column or row, that is wrong; `broken` may skip rows.
    """
    broken = broken or BrokenRows()
    examples = read_examples(path, "sft", others=("tools",), columns=columns, broken=broken)
    completions = completions_of(tokenizer, examples, path, broken, train_on=train_on)
    return _some(list(completions.values()), path, broken)


def completions_of(
    tokenizer: Any,
    examples: Examples,
    path: Path,
    broken: BrokenRows,
    *,
    train_on: Literal["assistant", "last"] = "assistant",
) -> dict[int, Completion]:
    """Tokenize the examples of a data set of prompts and completions, by row; `broken` may skip rows."""
    if settings_of(tokenizer).as_messages and not are_rendered(examples):
        examples = as_conversations(examples)
    if not examples.form.conversational:
        return dict(enumerate(tokenize(tokenizer, examples.columns["prompt"], examples.columns["completion"])))
    require_template(tokenizer, str(path))
    rows, rendered, talks = list[int](), list[tuple[RenderedPrompt, RenderedPrompt]](), list[_Conversation]()
    for row in range(len(examples)):
        with broken.row():
            talk = _conversation(tokenizer, examples, row, train_on)
            where, tools = examples.where(row), talk.tools
            require_tools_written(tokenizer, [*talk.prompt, *talk.answer], tools, where)
            rendered.append(rendered_halves(tokenizer, talk.prompt, talk.answer, where, tools=tools))
            talks.append(talk)
            rows.append(row)
    completions = _tokenize_rendered(tokenizer, examples.taken(rows), rendered, broken)
    return {
        rows[place]: _with_earlier(tokenizer, completion, talks[place], rendered[place][0], examples.where(rows[place]))
        for place, completion in completions.items()
    }


class _Conversation(NamedTuple):
    """A conversation before its last answer, that answer, and the number of first messages that are not trained."""

    prompt: Sequence[Message]
    answer: Sequence[Message]
    num_given: int
    tools: Sequence[Mapping[str, Any]]


def _conversation(
    tokenizer: Any, examples: Examples, row: int, train_on: Literal["assistant", "last"]
) -> _Conversation:
    """Split a row's conversation at its last answer."""
    where, columns = examples.where(row), examples.columns
    tools = (columns["tools"][row] or ()) if "tools" in columns else ()
    if examples.form.columns == ("messages",):
        prompt, answer = split_at_last_answer(columns["messages"][row], where)
        num_given = 0 if train_on == "assistant" else len(prompt)
    else:
        prompt, answer = columns["prompt"][row], columns["completion"][row]
        num_given = len(prompt)
        if len(answer) > 1 and answer[-1]["role"] == "assistant":
            prompt, answer = [*prompt, *answer[:-1]], answer[-1:]
    prompt, answer = (_unended(tokenizer, with_objects(tokenizer, half)) for half in (prompt, answer))
    return _Conversation(prompt, answer, num_given, tools)


def _with_earlier(
    tokenizer: Any, completion: Completion, talk: _Conversation, prompt: RenderedPrompt, where: str
) -> Completion:
    """Return the completion with those of the prompt's answers that are trained."""
    num = sum(message["role"] == "assistant" for message in talk.prompt[talk.num_given :])
    if not num:
        return completion
    ids = completion.token_ids[: completion.num_prompt]
    return completion._replace(
        earlier=tuple(answer_token_spans(tokenizer, talk.prompt, prompt, ids, where, tools=talk.tools)[-num:])
    )


def _unended(tokenizer: Any, messages: Sequence[Message]) -> list[Message]:
    """Return the messages; answers do not spell the end of sequence, which the chat template writes."""
    return [
        {**each, "content": without_end(each["content"], tokenizer.eos_token)}
        if each["role"] == "assistant" and isinstance(each.get("content"), str)
        else each
        for each in messages
    ]


def _some(examples: list[T], path: Path, broken: BrokenRows) -> list[T]:
    """Return the examples. Raises InputError if all rows were skipped."""
    if not examples:
        raise InputError(str(path), f"all {len(broken.errors)} rows are broken; {broken.errors[0]}")
    return examples


def tokenize(tokenizer: Any, prompts: Sequence[str], completions: Sequence[str]) -> list[Completion]:
    """Tokenize each row as prompt, completion and one end of sequence."""
    rendered = [prompt for prompt in prompts if isinstance(prompt, RenderedPrompt)]
    prompt_ids = token_ids(tokenizer, rendered) if rendered else begun_token_ids(tokenizer, prompts)
    unended = [without_end(completion, tokenizer.eos_token) for completion in completions]
    completion_ids = continued_token_ids(tokenizer, [as_text(tokenizer, text, is_answer=True) for text in unended])
    return [
        Completion([*prompt, *completion, tokenizer.eos_token_id], len(prompt))
        for prompt, completion in zip(prompt_ids, completion_ids, strict=True)
    ]


def _tokenize_rendered(
    tokenizer: Any, examples: Examples, rendered: Sequence[tuple[RenderedPrompt, RenderedPrompt]], broken: BrokenRows
) -> dict[int, Completion]:
    """Tokenize conversations as the chat template renders them, by row.

    Adds an end of sequence if it writes none.
    """
    completions = dict[int, Completion]()
    halves = (token_ids(tokenizer, [half[side] for half in rendered]) for side in (0, 1))
    for row, (prompt, whole) in enumerate(zip(*halves, strict=True)):
        with broken.row():
            completion = _ids_after(tokenizer, (prompt, whole), rendered[row], examples.where(row))
            has_end = _has_end(tokenizer, completion) or ends_its_answers(tokenizer, rendered[row][1])
            end = [] if has_end else [tokenizer.eos_token_id]
            completions[row] = Completion([*prompt, *completion, *end], len(prompt))
    return completions


def _has_end(tokenizer: Any, completion: Sequence[int]) -> bool:
    """Return whether the last special token of a completion is one at which the model stops."""
    special, ends = _special_ids(tokenizer), answer_ends(tokenizer)
    last = next((token_id for token_id in reversed(completion) if token_id in special), None)
    return last in ends


@functools.lru_cache(maxsize=8)
def _special_ids(tokenizer: Any) -> frozenset[int]:
    special = (token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special)
    return frozenset(special) | answer_ends(tokenizer)


def _ids_after(
    tokenizer: Any, ids: tuple[list[int], list[int]], texts: tuple[RenderedPrompt, RenderedPrompt], where: str
) -> Sequence[int]:
    """Return the token ids behind the prompt, from the ids and the texts of prompt and whole conversation.

    If the last token of the prompt is another one in the whole, the rest is encoded as what follows the prompt: the
    policy samples behind the tokens of the prompt.
    """
    (prompt_ids, whole_ids), (prompt, whole) = ids, texts
    if whole_ids[: len(prompt_ids)] == prompt_ids:
        return whole_ids[len(prompt_ids) :]
    completion_after(prompt, whole, where)
    (rest,) = continued_token_ids(tokenizer, [whole.part(len(prompt))])
    return rest


@dataclass(frozen=True, slots=True)
class PairTexts:
    """Pairs as texts, in the order of `examples`, which holds their locations and other columns."""

    prompts: list[str]
    chosen: list[str]
    rejected: list[str]
    examples: Examples


def read_pair_texts(
    path: Path,
    tokenizer: Any | None,
    *,
    others: Sequence[str] = (),
    columns: Mapping[str, str] | None = None,
    broken: BrokenRows | None = None,
) -> PairTexts:
    """Read the pairs of a data set of preferences as texts.

    Conversations are rendered by the chat template.

    Raises InputError naming the file, and the column or row, that is wrong; `broken` may skip rows.
    """
    broken = broken or BrokenRows()
    read = read_examples(path, "preferences", others=[*others, "tools", LITERALS], columns=columns, broken=broken)
    examples = with_rendered_prompts(read)
    if tokenizer is not None and settings_of(tokenizer).as_messages and not are_rendered(examples):
        examples = as_conversations(examples)
    if not examples.form.conversational:
        prompts, chosen, rejected = (examples.columns[name] for name in examples.form.columns)
        return PairTexts(prompts, chosen, rejected, examples)
    if tokenizer is None:
        raise InputError(str(path), "holds messages: a tokenizer is needed to render them")
    require_template(tokenizer, str(path))
    rows, texts = list[int](), list[tuple[str, str, str]]()
    for row in range(len(examples)):
        with broken.row():
            texts.append(_rendered_pair(tokenizer, examples, row))
            rows.append(row)
    prompts, chosen, rejected = map(list, zip(*_some(texts, path, broken), strict=True))
    return PairTexts(prompts, chosen, rejected, examples.taken(rows))


def read_pairs(
    tokenizer: Any, path: Path, columns: Mapping[str, str] | None = None, broken: BrokenRows | None = None
) -> list[Pair]:
    """Read the pairs of a data set of preferences.

    Prompt + response + end of sequence is tokenized as in serving.

    Raises InputError naming the file, and the column or row, that is wrong; `broken` may skip rows.
    """
    broken = broken or BrokenRows()
    texts = read_pair_texts(path, tokenizer, others=("margin",), columns=columns, broken=broken)
    whole = [scored_token_ids(tokenizer, texts.prompts, responses) for responses in (texts.chosen, texts.rejected)]
    num_prompt = [len(ids) for ids in whole_token_ids(tokenizer, texts.prompts)]
    margins = texts.examples.columns.get("margin", [0.0] * len(num_prompt))
    pairs = []
    for row, (chosen, rejected, num, margin) in enumerate(zip(*whole, num_prompt, margins, strict=True)):
        with broken.row():
            distance = _margin(texts.examples, row, margin)
            pairs.append(Pair(chosen, rejected, num, distance, draw_of(texts.prompts[row])))
    return _some(pairs, path, broken)


def draw_of(prompt: str) -> float:
    """Return a number in [0, 1) that depends on the prompt only: 53 bits of blake2b of its UTF-8."""
    digest = hashlib.blake2b(prompt.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53


def _margin(examples: Examples, row: int, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InputError(examples.where(row), f"column 'margin': expected a number, got {value!r}")
    return float(value)


def _rendered_pair(tokenizer: Any, examples: Examples, row: int) -> tuple[str, str, str]:
    """Render prompt, chosen and rejected response as texts."""
    where, columns = examples.where(row), examples.columns
    chosen, rejected = columns["chosen"][row], columns["rejected"][row]
    if "prompt" in examples.form.columns:
        prompt = columns["prompt"][row]
    else:
        prompt, chosen, rejected = split_common(chosen, rejected, where)
    prompt, chosen, rejected = (
        _unended(tokenizer, with_objects(tokenizer, messages)) for messages in (prompt, chosen, rejected)
    )
    tools = (columns["tools"][row] or ()) if "tools" in columns else ()
    require_tools_written(tokenizer, [*prompt, *chosen, *rejected], tools, where)
    text = render(tokenizer, prompt, where, is_prompt=True, tools=tools)
    chosen, rejected = (_response(tokenizer, prompt, text, messages, where, tools) for messages in (chosen, rejected))
    return text, chosen, rejected


def _response(
    tokenizer: Any,
    prompt: Sequence[Message],
    prompt_text: str,
    messages: Sequence[Message],
    where: str,
    tools: Sequence[Mapping[str, Any]],
) -> RenderedPrompt:
    """Render a response as the policy would write it: up to the end of its last message's content.

    A mark at the end of the content shows where that is in the rendered text. A last message that calls tools ends
    before the template's last special token.
    """
    whole = rendered_whole(tokenizer, prompt, messages, where, tools=tools)
    if messages[-1].get("tool_calls"):
        completion_after(prompt_text, whole, where)
        return whole.part(len(prompt_text), end_of_text(tokenizer, whole))
    last = {**messages[-1], "content": (messages[-1].get("content") or "").rstrip() + END_MARK}
    marked = rendered_whole(tokenizer, prompt, [*messages[:-1], last], where, tools=tools)
    end = marked.find(END_MARK)
    if end < 0 or not whole.startswith(marked[:end]):
        raise InputError(where, "the chat template changes the end of the last message")
    completion_after(prompt_text, marked[:end], where)
    return marked.part(len(prompt_text), end)
