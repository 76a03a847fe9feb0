"""Render conversations with a model's chat template, and split them into prompt and completion.

The caller passes a tokenizer of transformers. Does not import transformers.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from cluster.data.chat_settings import settings_of
from cluster.data.control_tokens import RenderedPrompt as RenderedPrompt
from cluster.data.control_tokens import SpelledTokens
from cluster.data.control_tokens import special_tokens as special_tokens
from cluster.data.template_limit import COUNTER, counted, counter
from cluster.data.template_marks import MARKER, mark, marked_template, numbered
from cluster.data.text_tokens import as_text
from cluster.errors import InputError

Message = dict[str, Any]
ANSWER = "antiphon-answer-41f0"
"""Stands for the policy's response to find what the template writes after a response."""
THINK, END_THINK = "<think>", "</think>"


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

    If the last message of a prompt is the assistant's, the model continues it. `tools` are the functions that the model
    may call, as JSON schemas. Control tokens that messages or tools spell are the text's literals. The settings of the
    tokenizer's folder apply: arguments of the template, system prompt, spelled tokens. Raises InputError at `where`.
    """
    from jinja2 import TemplateError

    settings = settings_of(tokenizer)
    try:
        is_continued = is_prompt and is_prefill(messages)
        if is_continued and settings.prefill == "refuse":
            raise InputError(where, 'the last message is the assistant\'s, and data.prefill is "refuse"')
        messages, tools = settings.with_system_prompt(messages), list(tools)
        original = messages
        spelled = SpelledTokens(tokenizer, [messages, tools], allowed=settings.allow_special_tokens)
        messages, tools = spelled.marked(messages), spelled.marked(tools)
        text = _applied(
            tokenizer, messages, where, is_prompt=is_prompt and not is_continued, tools=tools, is_continued=is_continued
        )
        header = "" if is_prompt else _unasked_header(tokenizer, str(tokenizer.chat_template))
    except (TemplateError, ValueError, TypeError, ArithmeticError, LookupError, RecursionError) as error:
        raise InputError(where, f"the chat template refuses it: {error}") from error
    rendered = spelled.unmarked(text.removesuffix(header))
    return RenderedPrompt(rendered, rendered.literals, original if is_prompt else ())


def marked_text(
    tokenizer: Any, messages: Sequence[Message], where: str, *, tools: Sequence[Mapping[str, Any]] = ()
) -> str:
    """Return the text of a prompt that can be rendered, with a mark before what is written for each message."""
    settings, is_continued = settings_of(tokenizer), is_prefill(messages)
    whole, tools = settings.with_system_prompt(messages), list(tools)
    spelled = SpelledTokens(tokenizer, [whole, tools], allowed=settings.allow_special_tokens)
    text = _applied(
        tokenizer,
        numbered(spelled.marked(whole)),
        where,
        is_prompt=not is_continued,
        tools=spelled.marked(tools),
        is_continued=is_continued,
        marks=True,
    )
    return str(spelled.unmarked(text))


def is_prefill(messages: Sequence[Message]) -> bool:
    """Return whether a conversation ends with the beginning of the model's answer."""
    return bool(messages) and messages[-1].get("role") == "assistant" and not messages[-1].get("tool_calls")


def _applied(
    tokenizer: Any,
    messages: Sequence[Message],
    where: str,
    *,
    is_prompt: bool,
    tools: Sequence[Mapping[str, Any]] = (),
    is_continued: bool = False,
    marks: bool = False,
) -> str:
    """Return what the chat template writes; raises InputError at `where` if it does not end.

    With `marks`, numbered messages are marked.
    """
    template = counted(tokenizer.get_chat_template(tools=tools or None))
    return str(
        tokenizer.apply_chat_template(
            messages,
            tools=tools or None,
            tokenize=False,
            add_generation_prompt=is_prompt,
            continue_final_message=is_continued,
            chat_template=marked_template(template) if marks else template,
            **settings_of(tokenizer).template_arguments(),
            **{COUNTER: counter(where), MARKER: mark},
        )
    )


@functools.lru_cache(maxsize=8)
def _unasked_header(tokenizer: Any, template: str) -> str:
    """Return the header of the model's turn that the template writes even if not asked for it, else an empty text."""
    from jinja2 import TemplateError

    known = [{"role": "user", "content": "?"}, {"role": "assistant", "content": ANSWER}]
    follow = {"role": "user", "content": "!"}
    try:
        texts = [
            _applied(tokenizer, messages, str(tokenizer.name_or_path), is_prompt=is_prompt)
            for messages, is_prompt in ((known, False), (known, True), ([*known, follow], False))
        ]
    except (TemplateError, ValueError, TypeError, ArithmeticError, LookupError):
        return ""
    tail, asked, history = (text.rpartition(ANSWER)[2] for text in texts)
    if tail != asked or history.startswith(tail):
        return ""
    pattern = special_tokens(tokenizer)
    found = pattern.search(tail) if pattern else None
    return str(tail[found.end() if found else 0 :].lstrip())


def ends_its_answers(tokenizer: Any, text: str) -> bool:
    """Return whether the template, which writes a header without being asked, ends its text with a special token."""
    pattern = special_tokens(tokenizer)
    if pattern is None or not _unasked_header(tokenizer, str(tokenizer.chat_template)):
        return False
    return any(found.end() == len(text.rstrip()) for found in pattern.finditer(text))


def joined(prompt: Sequence[Message], answer: Sequence[Message]) -> list[Message]:
    """Return prompt and answer as one conversation; an answer to a prefill continues the prompt's last message."""
    if not (is_prefill(prompt) and answer and answer[0].get("role") == "assistant"):
        return [*prompt, *answer]
    content = (prompt[-1].get("content") or "") + (answer[0].get("content") or "")
    return [*prompt[:-1], {**prompt[-1], **answer[0], "content": content}, *answer[1:]]


def rendered_halves(
    tokenizer: Any,
    prompt: Sequence[Message],
    answer: Sequence[Message],
    where: str,
    *,
    tools: Sequence[Mapping[str, Any]] = (),
) -> tuple[RenderedPrompt, RenderedPrompt]:
    """Return the texts of a prompt and of the whole conversation with its answer."""
    start = render(tokenizer, prompt, where, is_prompt=True, tools=tools)
    return start, rendered_whole(tokenizer, prompt, answer, where, tools=tools)


def rendered_whole(
    tokenizer: Any,
    prompt: Sequence[Message],
    answer: Sequence[Message],
    where: str,
    *,
    tools: Sequence[Mapping[str, Any]] = (),
) -> RenderedPrompt:
    """Return the text of a prompt with its answer.

    The answer always stands behind the prompt as it is sampled, also if the template writes the prompt of a finished
    conversation otherwise: without the thoughts that it opens, or without the system message. Raises InputError at
    `where` if the thoughts of the answer do not end then.
    """
    whole = render(tokenizer, joined(prompt, answer), where, is_prompt=False, tools=tools)
    start = render(tokenizer, prompt, where, is_prompt=True, tools=tools)
    if whole.startswith(start):
        return whole
    known = [{**answer[0], "content": ANSWER}, *answer[1:]]
    ended = render(tokenizer, joined(prompt, known), where, is_prompt=False, tools=tools)
    place = ended.rfind(ANSWER)
    if place < 0:
        return whole
    before, after = ended.part(0, place), ended.part(place + len(ANSWER))
    if not start.rstrip().endswith(THINK):
        is_alike = whole.startswith(before) and whole.endswith(after) and _have_one_header(tokenizer, start, before)
        return whole.part(len(before)).after(start) if is_alike else whole
    content = (answer[0].get("content") or "").removeprefix(THINK).lstrip("\n")
    if END_THINK not in content:
        raise InputError(where, f"the chat template opens {THINK} in the prompt, but the answer has no {END_THINK}")
    return after.after(as_text(tokenizer, content, is_answer=True).after(start))


def _have_one_header(tokenizer: Any, prompt: str, before: str) -> bool:
    """Return whether a prompt, and what stands before an answer, end with the same special token and text behind it."""
    pattern = special_tokens(tokenizer)
    places = [found.start() for found in pattern.finditer(before)] if pattern else []
    return bool(places) and prompt.endswith(before[places[-1] :])


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
