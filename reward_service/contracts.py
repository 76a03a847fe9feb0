"""The JSON of the HTTP face: what is asked, what is answered, and the one shape of every error."""

from __future__ import annotations

import json

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, JsonValue, field_validator, model_validator

from cluster.scoring import ScoreRequest


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class RewardsRequest(_Message):
    """Responses to score; every list has one entry a response."""

    prompts: list[str]
    """What was asked."""
    responses: list[str]
    """What was answered."""
    ids: list[str] | None = None
    """Names of the items, each its own; their positions unless given."""
    references: list[JsonValue] | None = None
    """Handed to the scorer as the column `references`."""
    scorer: str | None = None
    """The scorer meant, by name; this service's own unless given."""

    @field_validator("references")
    @classmethod
    def _finite(cls, references: list[JsonValue] | None) -> list[JsonValue] | None:
        json.dumps(references, allow_nan=False)
        return references

    @field_validator("prompts", "responses", "ids")
    @classmethod
    def _unicode(cls, texts: list[str] | None) -> list[str] | None:
        for position, text in enumerate(texts or []):
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise ValueError(f"item {position} is not valid Unicode: {error.reason}") from None
        return texts

    @model_validator(mode="after")
    def _same_lengths(self) -> RewardsRequest:
        for name in ("responses", "ids", "references"):
            values = getattr(self, name)
            if values is not None and len(values) != len(self.prompts):
                raise ValueError(f"{len(self.prompts)} prompts, {len(values)} {name}")
        if self.ids is not None and len(set(self.ids)) != len(self.ids):
            raise ValueError("ids repeat")
        return self

    def items(self) -> list[ScoreRequest]:
        """The same as records."""
        ids = self.ids or [str(position) for position in range(len(self.prompts))]
        columns = [{"references": r} for r in self.references] if self.references else [{} for _ in ids]
        rows = zip(ids, self.prompts, self.responses, columns, strict=True)
        return [ScoreRequest(id, prompt, response, column) for id, prompt, response, column in rows]


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
