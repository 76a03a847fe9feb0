"""JSON schemas of other trainers' reward APIs, so that they can use this service unmodified.

OpenRLHF's remote reward model (`POST /get_reward`), and vLLM's `POST /classify` and `POST /pooling` as verl's reward
loop reads them. Unknown fields are accepted and ignored.
"""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, model_validator

from cluster.data.control_tokens import RenderedPrompt
from cluster.scoring import ScoreRequest
from reward_service.http.schemas import Column, Text, Texts
from reward_service.http.special_tokens import response_of


class _Foreign(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True, use_attribute_docstrings=True)


class GetRewardRequest(_Foreign):
    """OpenRLHF's request: whole texts, their prompts and their labels."""

    query: Texts
    """Prompt and response together. Beginning, end and padding tokens around them are removed."""
    prompts: Texts | None = None
    """The prompts; each query must start with its prompt. If unset, a query is a response to an empty prompt."""
    labels: Column | None = None
    """Passed to the scorer as the columns `references` and `labels`."""

    @model_validator(mode="after")
    def _fits(self) -> GetRewardRequest:
        for name in ("prompts", "labels"):
            values = getattr(self, name)
            if values is not None and len(values) != len(self.query):
                raise ValueError(f"{len(self.query)} queries, {len(values)} {name}")
        for position, (query, prompt) in enumerate(zip(self.query, self.prompts or [], strict=False)):
            if response_of(query, prompt) is None:
                raise ValueError(f"query {position} does not start with its prompt")
        return self

    def items(self) -> list[ScoreRequest]:
        """Return the items as score requests."""
        prompts = self.prompts or [""] * len(self.query)
        columns = [{"references": label, "labels": label} for label in self.labels or []] or [{} for _ in self.query]
        rows = enumerate(zip(self.query, prompts, columns, strict=True))
        return [
            ScoreRequest(str(i), RenderedPrompt(prompt), response_of(query, prompt) or "", column)
            for i, (query, prompt, column) in rows
        ]


class GetRewardResponse(_Foreign):
    """OpenRLHF's response."""

    rewards: list[FiniteFloat]
    """The reward of each query."""
    scores: list[FiniteFloat]
    """The same rewards; OpenRLHF filters prompts by them."""
    extra_logs: dict[str, list[FiniteFloat]]
    """The parts that all queries have, by name."""


class ClassifyRequest(_Foreign):
    """vLLM's request: whole texts, each scored as a response to an empty prompt."""

    model: Text | None = None
    """Name of a scorer; any other name means the default scorer."""
    input: Text | Annotated[Texts, Field(min_length=1)]
    """One text or several."""
    use_activation: bool | None = None
    """Return sigmoid(reward), as vLLM does for one label; true by default."""
    activation: bool | None = None
    """Older name of `use_activation`."""

    def items(self) -> list[ScoreRequest]:
        """Return the items as score requests."""
        texts = [self.input] if isinstance(self.input, str) else self.input
        return [ScoreRequest(str(position), "", text) for position, text in enumerate(texts)]

    def activated(self, reward: float) -> float:
        """Return sigmoid(reward), or the reward itself if the request turns the activation off."""
        use_sigmoid = self.use_activation if self.use_activation is not None else self.activation
        return reward if use_sigmoid is False else _sigmoid(reward)


class Usage(_Foreign):
    """Token counts of vLLM's format; this service does not count tokens."""

    prompt_tokens: int = 0
    """Always 0."""
    total_tokens: int = 0
    """Always 0."""


class _ListResponse(_Foreign):
    """Common fields of vLLM's responses."""

    id: str
    """Name of the route."""
    object: str = "list"
    """Always `list`."""
    created: int = 0
    """Always 0, so that the same request has the same response."""
    model: str
    """Version of the scorer."""
    usage: Usage = Usage()
    """Always zeros."""


class ClassifyItem(_Foreign):
    """Result of one text."""

    index: int
    """Position of the text in the request."""
    label: str | None = "LABEL_0"
    """The only label."""
    probs: list[FiniteFloat]
    """A list of one number, the reward."""
    num_classes: int = 1
    """Always 1."""


class ClassifyResponse(_ListResponse):
    """vLLM's response of /classify."""

    data: list[ClassifyItem]
    """One entry per text."""


class PoolingItem(_Foreign):
    """Result of one text."""

    index: int
    """Position of the text in the request."""
    object: str = "pooling"
    """Always `pooling`."""
    data: list[FiniteFloat]
    """A list of one number, the reward."""


class PoolingResponse(_ListResponse):
    """vLLM's response of /pooling."""

    data: list[PoolingItem]
    """One entry per text."""


def _sigmoid(value: float) -> float:
    if value >= 0:
        return 1 / (1 + math.exp(-value))
    exponential = math.exp(value)
    return exponential / (1 + exponential)
