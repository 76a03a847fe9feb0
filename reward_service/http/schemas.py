"""The JSON of the HTTP face: what is asked, what is answered, and the one shape of every error."""

from __future__ import annotations

import json
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, FiniteFloat, model_validator
from pydantic_core import from_json

from cluster.scoring import ScoreRequest
from reward_service.config.service import MIN_TIMEOUT_S

MAX_ITEMS = 4096
MAX_CONTAINERS, MAX_COMMAS, MAX_KEYS = 100_000, 1_000_000, 64
"""Lists and objects, commas (in texts too) and keys at the top of one body; JSON may be nested 200 deep (pydantic's own
bound)."""
MAX_NAME = 256
"""Longest id and name, which answers repeat."""


def parse_json(body: bytes) -> Any:
    """The value of a body. Raises json.JSONDecodeError for what is not JSON, NaN and Infinity, and too many values."""
    if body.count(b"[") + body.count(b"{") > MAX_CONTAINERS or body.count(b",") > MAX_COMMAS:
        raise json.JSONDecodeError(f"more than {MAX_CONTAINERS} lists and objects or {MAX_COMMAS} commas", "", 0)
    try:
        value = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise json.JSONDecodeError(str(error), "", 0) from None
    if isinstance(value, dict) and len(value) > MAX_KEYS:
        raise json.JSONDecodeError(f"more than {MAX_KEYS} keys", "", 0)
    return value


def _unicode(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"not valid Unicode: {error.reason}") from None
    return text


def _finite(value: Any) -> Any:
    json.dumps(value, allow_nan=False)
    return value


Column = Annotated[list[Any], Field(max_length=MAX_ITEMS), AfterValidator(_finite)]
"""One JSON value an item, whose numbers are finite (1e999 is not)."""
Text = Annotated[str, AfterValidator(_unicode)]
"""A text without lone surrogates."""
Name = Annotated[Text, Field(max_length=MAX_NAME)]
Texts = Annotated[list[Text], Field(max_length=MAX_ITEMS, fail_fast=True)]
"""One text an item; validation stops at the first that is none."""


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)


class ChatMessage(_Message):
    """One turn of a conversation."""

    role: Text
    """Who speaks: system, user, assistant or tool."""
    content: Text
    """What is said."""


Conversation = Annotated[list[ChatMessage], Field(max_length=256, fail_fast=True)]


class RewardsRequest(_Message):
    """Responses to score; every list has one entry a response."""

    responses: Texts
    """What was answered."""
    prompts: Texts | None = None
    """What was asked; this or `messages`."""
    messages: Annotated[list[Conversation], Field(max_length=MAX_ITEMS, fail_fast=True)] | None = None
    """What was asked, as conversations, which the chat template of the reward model renders."""
    ids: Annotated[list[Name], Field(max_length=MAX_ITEMS, fail_fast=True)] | None = None
    """Names of the items, each its own; their positions unless given."""
    references: Column | None = None
    """Handed to the scorer as the column `references`."""
    columns: Annotated[dict[Name, Column], Field(max_length=MAX_KEYS)] | None = None
    """Further columns for the scorer, by name."""
    scorer: Name | None = None
    """The scorer meant, by name or by name@version; this service's default unless given."""
    timeout_s: float | None = Field(default=None, ge=MIN_TIMEOUT_S)
    """Deadline of this call, at most the service's own."""

    @model_validator(mode="after")
    def _fits(self) -> RewardsRequest:
        if (self.prompts is None) == (self.messages is None):
            raise ValueError("give either prompts or messages")
        if self.columns and "references" in self.columns and self.references is not None:
            raise ValueError("references are given twice")
        lists: dict[str, list[Any] | None] = {"ids": self.ids, "references": self.references}
        asked = {"prompts": self.prompts, "messages": self.messages} | lists | (self.columns or {})
        for name, values in asked.items():
            if values is not None and len(values) != len(self.responses):
                raise ValueError(f"{len(self.responses)} responses, {len(values)} {name}")
        if self.ids is not None and len(set(self.ids)) != len(self.ids):
            raise ValueError("ids repeat")
        return self

    def items(self) -> list[ScoreRequest]:
        """The same as records; a conversation is the item's column `messages`."""
        columns: dict[str, list[Any]] = dict(self.columns or {})
        if self.references is not None:
            columns["references"] = self.references
        if self.messages is not None:
            columns["messages"] = [[m.model_dump() for m in conversation] for conversation in self.messages]
        prompts = self.prompts if self.prompts is not None else [""] * len(self.responses)
        ids = self.ids or [str(position) for position in range(len(self.responses))]
        rows = enumerate(zip(ids, prompts, self.responses, strict=True))
        return [
            ScoreRequest(id, prompt, response, {name: values[i] for name, values in columns.items()})
            for i, (id, prompt, response) in rows
        ]


class ItemReward(_Message):
    """One item's reward, or the error that stands in its place."""

    id: str
    """The item's id."""
    reward: FiniteFloat | None
    """A finite number; null where there is an error."""
    parts: dict[str, FiniteFloat] = Field(default_factory=dict)
    """What the reward is made of, by name."""
    error: str | None = None
    """Who failed and how, where there is no reward."""
    unavailable: bool = False
    """Whether it may be had later: somebody whom the scorer asks is down or busy."""


class RewardsResponse(_Message):
    """One entry a response, in the order asked."""

    rewards: list[ItemReward]
    """The rewards."""
    model_version: str
    """Name and content digest of what scored."""


class ModelCard(_Message):
    """A scorer of this service."""

    id: str
    """Its name."""
    object: str = "model"
    """Always `model`, as in OpenAI's list."""
    version: str
    """Name and content digest: the same version always gives the same reward."""
    versions: list[str]
    """This version and older ones still served, each to be asked for as the scorer."""
    default: bool
    """Whether it scores where none is named."""


class ModelList(_Message):
    """The scorers of this service."""

    object: str = "list"
    """Always `list`."""
    data: list[ModelCard]
    """The scorers, the default first."""


class Health(_Message):
    """The service answers."""

    status: str = "ok"
    """Always `ok`."""


class Problem(_Message):
    """What was wrong with a request."""

    code: str
    """A stable word for programs."""
    message: str
    """A sentence for people."""
    field: str | None = None
    """The field of the request that is wrong, where there is one."""


class ErrorResponse(_Message):
    """The body of every answer that is not a success."""

    error: Problem
    """What was wrong."""
