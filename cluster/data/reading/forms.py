"""Recognises the form of a data set by its columns: TRL's, ShareGPT, Alpaca, and pairs of question and answer."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from cluster.data.reading.columns import Columns, Held, held
from cluster.data.reading.messages import Message, checked_messages
from cluster.errors import InputError

Kind = Literal["sft", "prompts", "preferences"]
Row = Mapping[str, Any]
PAIR = ("prompt", "chosen", "rejected")
FORMS: dict[Kind, tuple[tuple[str, ...], ...]] = {
    "sft": (("prompt", "completion"), ("messages",)),
    "prompts": (("prompt",),),
    "preferences": (PAIR, ("chosen", "rejected"), ("prompt", "completion", "label")),
}
"""The columns of each kind's forms; the first that fits is used. Forms without a prompt hold only conversations."""
CONVERSATIONS = ("messages", "conversations", "conversation")
"""Columns that hold whole conversations, as messages or as ShareGPT's turns."""
QUESTIONS = {
    "instruction": ("input", "output", "response"),
    "question": ("answer", "response", "solution"),
    "problem": ("answer", "response", "solution"),
    "query": ("answer", "response", "solution"),
}
"""Column that is a prompt -> the columns of which one must stand beside it, or it might be anything."""
ANSWERED = (
    ("prompt", "response"),
    ("question", "answer"),
    ("question", "response"),
    ("problem", "solution"),
    ("query", "response"),
    ("instruction", "response"),
)
"""Columns that hold a prompt and its completion under other names."""
USES_TURNS = "ShareGPT's turns"
MARK_OF_ANSWER = "\n\nAssistant:"
"""Precedes each answer in texts that hold a whole conversation, as those of HH-RLHF."""


@dataclass(frozen=True, slots=True)
class Form:
    """The columns that hold a data set's examples, and whether they are conversations or texts.

    `note` says how the file's columns were understood if they are not named like ours, or is empty.
    """

    columns: tuple[str, ...]
    conversational: bool
    note: str = field(default="", compare=False)


class Recipe(NamedTuple):
    """How the rows of a data set become examples.

    `make` returns the columns of the form from those of a row that are `taken`, or raises InputError at a place; None
    if they are ours already.
    """

    form: Form
    taken: tuple[str, ...]
    make: Callable[[Row, str], dict[str, Any]] | None = None


def find_recipe(path: Path, columns: Columns, kind: Kind) -> Recipe:
    """Return how a data set with these columns holds examples of a kind.

    Raises InputError naming the column that is missing, is neither text nor messages, or does not fit the others.
    """
    holds = {name: held(values) for name, values in columns.items()}
    recipe = _RECOGNISED[kind](path, columns, holds) or _plain(path, holds, kind)
    if recipe is None:
        missing = next((name for name in FORMS[kind][0] if name not in holds), "prompt")
        raise InputError(str(path), f"no column {missing!r}; it has {', '.join(holds) or 'none'}")
    return recipe


def _plain(path: Path, holds: Mapping[str, Held | None], kind: Kind) -> Recipe | None:
    """Return the recipe of a data set whose columns are named like ours."""
    for names in FORMS[kind]:
        if all(name in holds for name in names) and (
            "prompt" in names or all(holds[name] in ("messages", "turns") for name in names)
        ):
            conversational = _is_conversational(path, names, holds)
            note = USES_TURNS if any(holds[name] == "turns" for name in names) else ""
            return Recipe(Form(names, conversational, note), names)
    return None


def _is_conversational(path: Path, names: Sequence[str], holds: Mapping[str, Held | None]) -> bool:
    first = "messages" if holds[names[0]] == "turns" else holds[names[0]]
    for name in names:
        if name == "label":
            continue
        found = "messages" if holds[name] == "turns" else holds[name]
        if found not in ("text", "messages"):
            raise InputError(str(path), f"column {name!r} holds neither text nor messages of role and content")
        if found != first:
            what = f"column {names[0]!r} holds {first}, but {name!r} holds {found}: use one kind"
            raise InputError(str(path), f"{what}, or leave out {names[0]!r} if the messages include it")
    return first == "messages"


def _sft(path: Path, columns: Columns, holds: Mapping[str, Held | None]) -> Recipe | None:
    if {"prompt", "completion"} <= set(holds):
        return None
    if (name := _conversation_column(holds)) is not None:
        note = "" if name == "messages" and holds[name] == "messages" else _conversation_note(name, holds)
        taken = _present(holds, name, "system")
        return Recipe(Form(("messages",), True, note), taken, lambda row, where: _messages_of(row, name, where))
    if {"instruction", "output"} <= set(holds):
        return _alpaca(holds)
    for prompt, completion in ANSWERED:
        if holds.get(prompt) == holds.get(completion) == "text":
            note = f"prompt is {prompt}, completion is {completion}"
            make = _copied({"prompt": prompt, "completion": completion})
            return Recipe(Form(("prompt", "completion"), False, note), (prompt, completion), make)
    if holds.get("text") == "text":
        form = Form(("prompt", "completion"), False, "column text, which is trained on as a whole")
        return Recipe(form, ("text",), lambda row, where: {"prompt": "", "completion": row["text"]})
    return None


def _prompts(path: Path, columns: Columns, holds: Mapping[str, Held | None]) -> Recipe | None:
    if "prompt" in holds:
        return None
    if (name := _conversation_column(holds)) is not None:
        note = f"{_conversation_note(name, holds)}, up to the last answer"
        taken = _present(holds, name, "system")
        return Recipe(Form(("prompt",), True, note), taken, lambda row, where: _before_answer(row, name, where))
    if (question := _question(holds)) is not None:
        taken = _present(holds, question, *(("input",) if question == "instruction" else ()))
        note = f"prompt is {' and '.join(taken)}"
        return Recipe(Form(("prompt",), False, note), taken, lambda row, where: {"prompt": _asked(row, question)})
    return None


def _preferences(path: Path, columns: Columns, holds: Mapping[str, Held | None]) -> Recipe | None:
    sides = {"messages" if holds.get(name) == "turns" else holds.get(name) for name in ("chosen", "rejected")}
    if len(sides) > 1 or not sides & {"text", "messages"}:
        return _labels(path, columns, holds)
    side = next(iter(sides))
    prompt = "messages" if holds.get("prompt") == "turns" else holds.get("prompt")
    if side == "messages" and prompt == "messages":
        return Recipe(Form(PAIR, True, _turns_note(holds, PAIR)), PAIR, _without_prompt)
    if side == "messages" and prompt == "text":
        note = "the prompt is the first messages of chosen and rejected"
        return Recipe(Form(PAIR, True, note), PAIR, _with_text_prompt)
    if "prompt" in holds:
        return None
    if side == "messages" and (name := _conversation_column(holds)) is not None and holds[name] == "turns":
        taken = _present(holds, name, "chosen", "rejected", "system")
        note = _conversation_note(name, holds)
        return Recipe(Form(PAIR, True, note), taken, lambda row, where: _after_turns(row, name, where))
    if side == "text" and (question := _question(holds)) is not None:
        taken = _present(holds, question, "input", "chosen", "rejected")
        note = f"prompt is {question}"
        return Recipe(
            Form(PAIR, False, note), taken, lambda row, where: {**_sides(row), "prompt": _asked(row, question)}
        )
    if side == "text":
        note = "the prompt is the common beginning of chosen and rejected"
        return Recipe(Form(PAIR, False, note), ("chosen", "rejected"), _with_common_beginning)
    return None


def _labels(path: Path, columns: Columns, holds: Mapping[str, Held | None]) -> Recipe | None:
    """Check the column label of unpaired preferences."""
    names = FORMS["preferences"][2]
    if {"chosen", "rejected"} <= set(holds) or not set(names) <= set(holds):
        return None
    if not any(label_of(value) is not None for value in columns["label"]):
        raise InputError(str(path), "column 'label' does not hold true or false")
    return None


_RECOGNISED: dict[Kind, Callable[[Path, Columns, Mapping[str, Held | None]], Recipe | None]] = {
    "sft": _sft,
    "prompts": _prompts,
    "preferences": _preferences,
}


def label_of(value: Any) -> bool | None:
    """Return a label as true or false, also if it is 1 or 0 or a text of these, or None if it is none."""
    if isinstance(value, bool):
        return value
    if isinstance(value, str):
        return {"true": True, "false": False, "1": True, "0": False}.get(value.strip().lower())
    return bool(value) if isinstance(value, int | float) and value in (0, 1) else None


def _present(holds: Mapping[str, Any], *names: str) -> tuple[str, ...]:
    return tuple(name for name in names if name in holds)


def _turns_note(holds: Mapping[str, Held | None], names: Sequence[str]) -> str:
    return USES_TURNS if any(holds.get(name) == "turns" for name in names) else ""


def _conversation_column(holds: Mapping[str, Held | None]) -> str | None:
    return next((name for name in CONVERSATIONS if holds.get(name) in ("messages", "turns")), None)


def _conversation_note(name: str, holds: Mapping[str, Held | None]) -> str:
    system = " after the column system" if holds.get("system") == "text" else ""
    return f"{'ShareGPT: turns' if holds[name] == 'turns' else 'messages'} in {name}{system}"


def _question(holds: Mapping[str, Held | None]) -> str | None:
    """Return the column that holds prompts under another name, or None."""
    beside = {"chosen", "rejected"}
    return next(
        (
            name
            for name, others in QUESTIONS.items()
            if holds.get(name) == "text" and (any(other in holds for other in others) or beside <= set(holds))
        ),
        None,
    )


def _copied(names: Mapping[str, str]) -> Callable[[Row, str], dict[str, Any]]:
    return lambda row, where: {ours: row[theirs] for ours, theirs in names.items()}


def _messages_of(row: Row, name: str, where: str) -> dict[str, list[Message]]:
    """Return the conversation of a row, after its column system if the conversation has no system message."""
    messages, system = checked_messages(row[name], name, where), row.get("system")
    if isinstance(system, str) and system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    return {"messages": messages}


def _before_answer(row: Row, name: str, where: str) -> dict[str, Any]:
    """Return the messages before the last answer, if a conversation ends with one."""
    messages = _messages_of(row, name, where)["messages"]
    while messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if not messages:
        raise InputError(where, f"column {name!r}: no message precedes the assistant's")
    return {"prompt": messages}


def _asked(row: Row, question: str) -> Any:
    """Return a question, or an instruction with its input."""
    asked, more = row[question], row.get("input") if question == "instruction" else None
    return f"{asked}\n\n{more}" if isinstance(asked, str) and isinstance(more, str) and more.strip() else asked


def _alpaca(holds: Mapping[str, Held | None]) -> Recipe:
    """Return the recipe of instruction, input and output; with system or history they are conversations."""
    taken = _present(holds, "instruction", "input", "output", "system", "history")
    note = f"Alpaca: prompt is {' and '.join(_present(holds, 'instruction', 'input'))}, completion is output"
    if holds.get("system") == "text" or "history" in taken:
        note = f"Alpaca with {' and '.join(_present(holds, 'system', 'history'))}, as messages"
        return Recipe(Form(("messages",), True, note), taken, _alpaca_messages)
    return Recipe(
        Form(("prompt", "completion"), False, note),
        taken,
        lambda row, where: {"prompt": _asked(row, "instruction"), "completion": row["output"]},
    )


def _alpaca_messages(row: Row, where: str) -> dict[str, Any]:
    system, history = row.get("system"), row.get("history") or []
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    for pair in [*history, (_asked(row, "instruction"), row["output"])]:
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise InputError(where, f"columns instruction, output and history: expected texts, got {pair!r:.80}")
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return {"messages": messages}


def _sides(row: Row) -> dict[str, Any]:
    return {"chosen": row["chosen"], "rejected": row["rejected"]}


def _checked_sides(row: Row, where: str) -> dict[str, list[Message]]:
    return {name: checked_messages(row[name], name, where) for name in ("chosen", "rejected")}


def _without_prompt(row: Row, where: str) -> dict[str, Any]:
    """Return a pair whose sides do not repeat the prompt's messages."""
    prompt, sides = checked_messages(row["prompt"], "prompt", where), _checked_sides(row, where)
    if all(len(side) > len(prompt) and side[: len(prompt)] == prompt for side in sides.values()):
        sides = {name: side[len(prompt) :] for name, side in sides.items()}
    return {"prompt": prompt, **sides}


def _with_text_prompt(row: Row, where: str) -> dict[str, Any]:
    """Return a pair whose prompt is a text, and whose sides are answers or conversations that include the prompt."""
    sides, prompt = _checked_sides(row, where), row["prompt"]
    if not isinstance(prompt, str):
        raise InputError(where, f"column 'prompt': expected text, got {prompt!r:.80}")
    if all(side[0]["role"] == "assistant" for side in sides.values()):
        return {"prompt": [{"role": "user", "content": prompt}], **sides}
    pairs = zip(sides["chosen"][:-1], sides["rejected"][:-1], strict=False)
    common = [first for first, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)]
    if not common:
        raise InputError(where, "chosen and rejected have no first message in common, so no prompt")
    if prompt not in (message.get("content") for message in common):
        raise InputError(where, "the prompt is none of the first messages of chosen and rejected")
    return {"prompt": common, **{name: side[len(common) :] for name, side in sides.items()}}


def _after_turns(row: Row, name: str, where: str) -> dict[str, Any]:
    return {"prompt": _messages_of(row, name, where)["messages"], **_checked_sides(row, where)}


def _with_common_beginning(row: Row, where: str) -> dict[str, Any]:
    """Return a pair of texts whose prompt is what both begin with, up to the last answer or to a whole word."""
    chosen, rejected = row["chosen"], row["rejected"]
    if not isinstance(chosen, str) or not isinstance(rejected, str):
        raise InputError(where, f"columns chosen and rejected: expected texts, got {chosen!r:.40} and {rejected!r:.40}")
    equal = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False))
    common = "".join(character for character, _ in equal)
    if MARK_OF_ANSWER in common:
        end = common.rindex(MARK_OF_ANSWER) + len(MARK_OF_ANSWER)
    else:
        end = max((place for place, character in enumerate(common) if character.isspace()), default=0)
    if not common[:end].strip():
        raise InputError(where, "no column 'prompt', and chosen and rejected have no common beginning")
    return {"prompt": common[:end], "chosen": chosen[end:], "rejected": rejected[end:]}
