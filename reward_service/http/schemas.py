"""JSON schemas of the HTTP API: requests, responses, and the one format of every error."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, FiniteFloat, model_validator
from pydantic_core import from_json

from cluster.data.control_tokens import RenderedPrompt
from cluster.scoring import ScoreRequest
from reward_service.config.service import MIN_TIMEOUT_S

MAX_ITEMS = 4096
MAX_CONTAINERS, MAX_COMMAS, MAX_KEYS = 100_000, 1_000_000, 64
"""Most lists and objects, commas (including those in texts) and top-level keys of a body. Pydantic limits nesting to
200 levels."""
MAX_NAME = 256
"""Longest id and name; responses repeat them."""


def parse_json(body: bytes) -> Any:
    """Parse a body. Raises json.JSONDecodeError for invalid JSON, NaN, Infinity and too many values."""
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


def finite_json(value: Any) -> Any:
    """Return the JSON value. Raises ValueError if it contains NaN or an infinite number."""
    json.dumps(value, allow_nan=False)
    return value


Column = Annotated[list[Any], Field(max_length=MAX_ITEMS), AfterValidator(finite_json)]
"""One JSON value per item; all numbers are finite (1e999 is not)."""
Text = Annotated[str, AfterValidator(_unicode)]
"""A text without lone surrogates."""
Name = Annotated[Text, Field(max_length=MAX_NAME)]
Texts = Annotated[list[Text], Field(max_length=MAX_ITEMS, fail_fast=True)]
"""One text per item; validation stops at the first invalid one."""


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)


class ChatMessage(_Message):
    """One turn of a conversation."""

    role: Text
    """Role of the speaker: system, user, assistant or tool."""
    content: Text
    """Text of the turn."""


Span = Annotated[list[int], Field(min_length=2, max_length=2)]
Spans = Annotated[list[Span], Field(fail_fast=True)]
Literals = Annotated[list[Spans | None], Field(max_length=MAX_ITEMS, fail_fast=True)]
"""Per item the spans of its text that are text, or null."""


def _require_spans(
    name: str, literals: Sequence[Sequence[list[int]] | None] | None, texts: Sequence[str] | None
) -> None:
    """Raise ValueError if spans are not in order or lie outside their text."""
    for position, (spans, text) in enumerate(zip(literals or (), texts or (), strict=False)):
        places = [place for span in spans or () for place in span]
        if places != sorted(places) or any(not 0 <= place <= len(text) for place in places):
            raise ValueError(f"{name}: item {position} has spans out of order or outside its text")


def _with_literals(texts: Sequence[str], literals: Sequence[Sequence[list[int]] | None] | None) -> list[str]:
    """Return the texts with their spans; texts whose spans are null become plain."""
    if literals is None:
        return list(texts)
    return [
        str(text) if spans is None else RenderedPrompt(text, [(start, end) for start, end in spans])
        for text, spans in zip(texts, literals, strict=True)
    ]


Conversation = Annotated[list[ChatMessage], Field(max_length=256, fail_fast=True)]


class RewardsRequest(_Message):
    """Responses to score; every list has one entry per response."""

    responses: Texts
    """The responses."""
    prompts: Texts | None = None
    """The prompts; give either these or `messages`."""
    messages: Annotated[list[Conversation], Field(max_length=MAX_ITEMS, fail_fast=True)] | None = None
    """The prompts as conversations; the reward model's chat template renders them."""
    prompt_literals: Literals | None = None
    """Spans of each prompt, as pairs of start and end in characters, that are text although they spell control tokens
    of the reward model; null for a prompt that is plain text throughout. If unset, prompts are read as a chat template
    writes them, with their control tokens."""
    response_literals: Literals | None = None
    """The same for each response. If unset or null, a response is plain text throughout."""
    ids: Annotated[list[Name], Field(max_length=MAX_ITEMS, fail_fast=True)] | None = None
    """Unique ids of the items; their positions by default."""
    references: Column | None = None
    """Passed to the scorer as the column `references`."""
    columns: Annotated[dict[Name, Column], Field(max_length=MAX_KEYS)] | None = None
    """More columns for the scorer, by name."""
    scorer: Name | None = None
    """Name or name@version of the scorer; the service's default if unset."""
    timeout_s: float | None = Field(default=None, ge=MIN_TIMEOUT_S)
    """Deadline of this call in seconds; at most the service's own."""

    @model_validator(mode="after")
    def _fits(self) -> RewardsRequest:
        if (self.prompts is None) == (self.messages is None):
            raise ValueError("give either prompts or messages")
        if self.columns and "references" in self.columns and self.references is not None:
            raise ValueError("give references either in references or in columns")
        lists: dict[str, list[Any] | None] = {"ids": self.ids, "references": self.references}
        lists |= {"prompt_literals": self.prompt_literals, "response_literals": self.response_literals}
        by_name = {"prompts": self.prompts, "messages": self.messages} | lists | (self.columns or {})
        for name, values in by_name.items():
            if values is not None and len(values) != len(self.responses):
                raise ValueError(f"{len(self.responses)} responses, {len(values)} {name}")
        if self.ids is not None and len(set(self.ids)) != len(self.ids):
            raise ValueError("ids repeat")
        _require_spans("prompt_literals", self.prompt_literals, self.prompts)
        _require_spans("response_literals", self.response_literals, self.responses)
        return self

    def items(self) -> list[ScoreRequest]:
        """Return the items as score requests; a conversation becomes the item's column `messages`."""
        columns: dict[str, list[Any]] = dict(self.columns or {})
        if self.references is not None:
            columns["references"] = self.references
        if self.messages is not None:
            columns["messages"] = [[m.model_dump() for m in conversation] for conversation in self.messages]
        prompts = list(map(RenderedPrompt, self.prompts)) if self.prompts is not None else [""] * len(self.responses)
        prompts = _with_literals(prompts, self.prompt_literals)
        responses = _with_literals(self.responses, self.response_literals)
        ids = self.ids or [str(position) for position in range(len(self.responses))]
        rows = enumerate(zip(ids, prompts, responses, strict=True))
        return [
            ScoreRequest(id, prompt, response, {name: values[i] for name, values in columns.items()})
            for i, (id, prompt, response) in rows
        ]


class ItemReward(_Message):
    """One item's reward, or its error."""

    id: str
    """The item's id."""
    reward: FiniteFloat | None
    """A finite number; null if there is an error."""
    parts: dict[str, FiniteFloat] = Field(default_factory=dict)
    """Parts of the reward, by name."""
    error: str | None = None
    """What failed, if there is no reward."""
    unavailable: bool = False
    """A retry may succeed: a service that the scorer calls is down or busy."""
    batch_failed: bool = False
    """The scorer failed on several responses at once; it may be able to score this one alone."""


class RewardsResponse(_Message):
    """One entry per response, in the order of the request."""

    rewards: list[ItemReward]
    """The rewards."""
    model_version: str
    """Name and content digest of the scorer."""


class ModelCard(_Message):
    """A scorer of this service."""

    id: str
    """Its name."""
    object: str = "model"
    """Always `model`, as in OpenAI's list."""
    version: str
    """Name and content digest: the same version always gives the same reward."""
    versions: list[str]
    """This version and older ones that are still served; each can be requested as the scorer."""
    default: bool
    """It is used if a request names no scorer."""


class ModelList(_Message):
    """The scorers of this service."""

    object: str = "list"
    """Always `list`."""
    data: list[ModelCard]
    """The scorers, the default first."""


class Health(_Message):
    """The service is alive."""

    status: str = "ok"
    """Always `ok`."""


class Problem(_Message):
    """An error of a request."""

    code: str
    """Stable code for programs."""
    message: str
    """Message for people."""
    field: str | None = None
    """The wrong field of the request, if the error is about one."""


class ErrorResponse(_Message):
    """The body of every error response."""

    error: Problem
    """The error."""
