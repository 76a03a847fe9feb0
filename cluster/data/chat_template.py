"""Render conversations with a model's chat template, and split them into prompt and completion.

The caller passes a tokenizer of transformers. Does not import transformers.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence
from types import FrameType
from typing import Any

from cluster.errors import InputError

Message = dict[str, Any]
TEMPLATE_FILE = "<template>"
"""The file name of a template that jinja compiled from a string."""
MAX_TEMPLATE_LINES = 1_000_000


class RenderedPrompt(str):
    """A prompt that the chat template wrote: its special tokens are in the text, the tokenizer adds none."""


def require_template(tokenizer: Any, where: str) -> None:
    """Raise InputError naming the data set and the model folder if its tokenizer has no chat template."""
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(where, f"holds messages, but the tokenizer of {tokenizer.name_or_path} has no chat template")


def render(
    tokenizer: Any,
    messages: Sequence[Message],
    where: str,
    *,
    is_prompt: bool,
    tools: Sequence[Mapping[str, Any]] = (),
) -> RenderedPrompt:
    """Return the text of a conversation; a prompt ends where the model's turn begins.

    `tools` are the functions that the model may call, as JSON schemas. Raises InputError at `where`.
    """
    from jinja2 import TemplateError

    try:
        with _bounded(where):
            text = tokenizer.apply_chat_template(
                list(messages), tools=list(tools) or None, tokenize=False, add_generation_prompt=is_prompt
            )
    except (TemplateError, ValueError, TypeError, ArithmeticError, LookupError, RecursionError) as error:
        raise InputError(where, f"the chat template refuses it: {error}") from error
    return RenderedPrompt(text)


@contextlib.contextmanager
def _bounded(where: str) -> Iterator[None]:
    """Stop a template that loops without end: jinja's sandbox prevents harm, not loops.

    Jinja compiles a template to Python; only those lines are counted. Raises InputError at `where`.
    """
    num_lines = 0

    def on_line(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal num_lines
        num_lines += 1
        if num_lines > MAX_TEMPLATE_LINES:
            raise InputError(where, f"the chat template does not end (more than {MAX_TEMPLATE_LINES:,} lines)")
        return on_line

    def on_call(frame: FrameType, event: str, argument: Any) -> Any:
        return on_line if frame.f_code.co_filename == TEMPLATE_FILE else None

    before = sys.gettrace()
    sys.settrace(on_call)
    try:
        yield
    finally:
        sys.settrace(before)


def token_ids(tokenizer: Any, rendered: Sequence[RenderedPrompt]) -> list[list[int]]:
    """Return the token ids of each rendered text; adds no special tokens."""
    ids: list[list[int]] = tokenizer(list(rendered), add_special_tokens=False)["input_ids"] if rendered else []
    return ids


def scored_token_ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Return the token ids of whole texts (prompt, response, end of sequence), for training and using a reward model.

    The tokenizer adds its special tokens, unless a text already begins with the one that marks its beginning.
    """

    def is_begun(text: str) -> bool:
        return bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)

    ids: list[list[int]] = []
    for begun, alike in itertools.groupby(texts, key=is_begun):
        ids += tokenizer(list(alike), add_special_tokens=not begun)["input_ids"]
    return ids


def completion_after(prompt: Sequence[Any], whole: Sequence[Any], where: str) -> Sequence[Any]:
    """Return what follows the prompt in a rendered conversation (text or token ids).

    Raises InputError at `where` if it does not begin with the prompt: the model would be trained on a prompt that
    differs from the one it is sampled with.
    """
    if whole[: len(prompt)] != prompt:
        raise InputError(where, "the chat template renders the prompt alone differently from the whole conversation")
    return whole[len(prompt) :]


def split_at_last_answer(messages: Sequence[Message], where: str) -> tuple[list[Message], list[Message]]:
    """Split a conversation into prompt and completion; the completion is its last assistant message.

    Raises InputError at `where` if there is no assistant message, or if nothing precedes it.
    """
    answers = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        raise InputError(where, "no message has the role assistant")
    if not answers[-1]:
        raise InputError(where, "no message precedes the assistant's")
    return list(messages[: answers[-1]]), [messages[answers[-1]]]


def split_common(
    chosen: Sequence[Message], rejected: Sequence[Message], where: str
) -> tuple[list[Message], list[Message], list[Message]]:
    """Split two conversations into their common first messages (the prompt) and the rest of each.

    Each rest has at least the last message. Raises InputError at `where` if they share no message.
    """
    most = min(len(chosen), len(rejected)) - 1
    num = next((place for place in range(most) if chosen[place] != rejected[place]), most)
    if not num:
        raise InputError(where, "chosen and rejected have no first message in common, so no prompt")
    return list(chosen[:num]), list(chosen[num:]), list(rejected[num:])
