"""The JSON of the HTTP face: what is asked, what is answered, and the one shape of every error."""

from __future__ import annotations

import json
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, FiniteFloat, JsonValue, model_validator
from pydantic_core import from_json

from cluster.scoring import ScoreRequest

MAX_ITEMS = 4096
MAX_CONTAINERS = 100_000
"""Lists and objects in one body; JSON may be nested 200 deep (pydantic's own bound)."""


def parse_json(body: bytes) -> Any:
    """The value of a body. Raises json.JSONDecodeError for what is not JSON, NaN and Infinity, and too many values."""
    if body.count(b"[") + body.count(b"{") > MAX_CONTAINERS:
        raise json.JSONDecodeError(f"more than {MAX_CONTAINERS} lists and objects", "", 0)
    try:
        return from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise json.JSONDecodeError(str(error), "", 0) from None


def _unicode(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"not valid Unicode: {error.reason}") from None
    return text


def _finite(value: JsonValue) -> JsonValue:
    json.dumps(value, allow_nan=False)
    return value


FiniteJson = Annotated[JsonValue, AfterValidator(_finite)]
"""Any JSON value whose numbers are finite (1e999 is not)."""
Text = Annotated[str, AfterValidator(_unicode)]
"""A text without lone surrogates."""


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)


class ChatMessage(_Message):
    """One turn of a conversation."""

    role: Text
    """Who speaks: system, user, assistant or tool."""
    content: Text
    """What is said."""


class RewardsRequest(_Message):
    """Responses to score; every list has one entry a response."""

    responses: list[Text] = Field(max_length=MAX_ITEMS)
    """What was answered."""
    prompts: list[Text] | None = Field(default=None, max_length=MAX_ITEMS)
    """What was asked; this or `messages`."""
    messages: list[list[ChatMessage]] | None = Field(default=None, max_length=MAX_ITEMS)
    """What was asked, as conversations, which the chat template of the reward model renders."""
    ids: list[Text] | None = None
    """Names of the items, each its own; their positions unless given."""
    references: list[FiniteJson] | None = None
    """Handed to the scorer as the column `references`."""
    columns: dict[Text, list[FiniteJson]] | None = None
    """Further columns for the scorer, by name."""
    scorer: Text | None = None
    """The scorer meant, by name or by name@version; this service's default unless given."""
    timeout_s: float | None = Field(default=None, gt=0)
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
