"""Settings of a model's conversations, kept in its folder, so that every part speaks to the model in the same way.

`chat_settings.json` lies beside the tokenizer. Stages carry it from the initial model to every model made from it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from cluster.errors import InputError

SETTINGS_FILE = "chat_settings.json"
SYSTEM_ROLES = ("system", "developer")


@dataclass(frozen=True, slots=True)
class ChatSettings:
    """How conversations and texts become prompts; `data` in the run file describes the settings.

    `date` (YYYY-MM-DD) is what a template that writes today's date takes for today: the day on which a run started.
    """

    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    system_prompt: str | None = None
    allow_special_tokens: bool = False
    as_messages: bool = False
    prefill: Literal["continue", "refuse"] = "continue"
    date: str | None = None

    @classmethod
    def of(cls, folder: Path) -> ChatSettings:
        """Return the settings of a model folder, or the defaults. Raises InputError if its file is invalid."""
        path = folder / SETTINGS_FILE
        if not path.is_file():
            return cls()
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            found = cls(**values)
            found.template_arguments()
            return found
        except (ValueError, TypeError) as error:
            raise InputError(str(path), f"is not a file of chat settings ({error})") from error

    def over(self, other: ChatSettings) -> ChatSettings:
        """Return these settings; those that have their default are taken from `other`."""
        changed = {each.name: getattr(self, each.name) for each in fields(self)}
        default = ChatSettings()
        return replace(other, **{name: value for name, value in changed.items() if value != getattr(default, name)})

    def write(self, folder: Path) -> None:
        """Write the settings into a model folder."""
        text = json.dumps(asdict(self), indent=1, ensure_ascii=False)
        (folder / SETTINGS_FILE).write_text(text + "\n", encoding="utf-8")

    def template_arguments(self) -> dict[str, Any]:
        """Return the arguments that the chat template gets besides messages and tools."""
        if self.date is None:
            return dict(self.chat_template_kwargs)
        return {"strftime_now": datetime.fromisoformat(self.date).strftime, **self.chat_template_kwargs}

    def with_system_prompt(self, messages: Sequence[Mapping[str, Any]]) -> list[Any]:
        """Return the messages, with the system prompt in front unless they start with one of their own."""
        starts = bool(messages) and messages[0].get("role") in SYSTEM_ROLES
        first = [] if starts or self.system_prompt is None else [{"role": "system", "content": self.system_prompt}]
        return [*first, *messages]


def settings_of(tokenizer: Any) -> ChatSettings:
    """Return the settings that were read with the tokenizer, or the defaults."""
    found = getattr(tokenizer, "chat_settings", None)
    return found if isinstance(found, ChatSettings) else ChatSettings()


def write_settings_of(tokenizer: Any, folder: Path) -> None:
    """Write the settings of a tokenizer into the folder of a model, unless they are the defaults."""
    if (settings := settings_of(tokenizer)) != ChatSettings():
        settings.write(folder)


def answer_ends(tokenizer: Any) -> frozenset[int]:
    """Return the tokens that end an answer of the model whose tokenizer it is."""
    found = getattr(tokenizer, "answer_end_ids", None)
    return found if isinstance(found, frozenset) else frozenset((tokenizer.eos_token_id,))


def end_ids(folder: Path, tokenizer: Any) -> frozenset[int]:
    """Return the tokens that end a response: the tokenizer's end of sequence and those of generation_config.json."""
    path = folder / "generation_config.json"
    try:
        named = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.is_file() else None
    except (ValueError, AttributeError) as error:
        raise InputError(str(path), f"is not a JSON object ({error})") from error
    ends = [*(named if isinstance(named, list) else [named]), tokenizer.eos_token_id]
    return frozenset(end for end in ends if isinstance(end, int))
