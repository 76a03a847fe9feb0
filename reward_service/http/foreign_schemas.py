"""The JSON of other trainers' reward channels, so that they can point at this service unmodified.

OpenRLHF's remote reward model (`POST /get_reward`) and vLLM's `POST /classify` and `POST /pooling`, as verl's reward
loop reads them. Fields that these clients send and that change no reward here are taken and not read.
"""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, model_validator

from cluster.scoring import ScoreRequest
from reward_service.http.schemas import Column, Text, Texts


class _Foreign(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True, use_attribute_docstrings=True)


class GetRewardRequest(_Foreign):
    """OpenRLHF's question: whole texts, their prompts and their labels."""

    query: Texts
    """Prompt and response together."""
    prompts: Texts | None = None
    """The prompts alone; each must begin its query. Without them the query is one response to an empty prompt."""
    labels: Column | None = None
    """Handed to the scorer as the columns `references` and `labels`."""

    @model_validator(mode="after")
    def _fits(self) -> GetRewardRequest:
        for name in ("prompts", "labels"):
            values = getattr(self, name)
            if values is not None and len(values) != len(self.query):
                raise ValueError(f"{len(self.query)} queries, {len(values)} {name}")
        for position, (query, prompt) in enumerate(zip(self.query, self.prompts or [], strict=False)):
            if not query.startswith(prompt):
                raise ValueError(f"query {position} does not begin with its prompt")
        return self

    def items(self) -> list[ScoreRequest]:
        """The same as records."""
        prompts = self.prompts or [""] * len(self.query)
        columns = [{"references": label, "labels": label} for label in self.labels or []] or [{} for _ in self.query]
        rows = enumerate(zip(self.query, prompts, columns, strict=True))
        return [ScoreRequest(str(i), prompt, query[len(prompt) :], column) for i, (query, prompt, column) in rows]


class GetRewardResponse(_Foreign):
    """OpenRLHF's answer."""

    rewards: list[FiniteFloat]
    """The reward of each query."""
    scores: list[FiniteFloat]
    """The same, which OpenRLHF uses to filter prompts."""
    extra_logs: dict[str, list[FiniteFloat]]
    """The parts that every query has, by name."""


class ClassifyRequest(_Foreign):
    """vLLM's question: whole texts, each scored as one response to an empty prompt."""

    model: Text | None = None
    """The scorer meant, if it is one of this service; any other name means the default."""
    input: Text | Annotated[Texts, Field(min_length=1)]
    """One text or several."""
    use_activation: bool | None = None
    """Whether to answer sigmoid(reward), as vLLM does for one label; it does unless told otherwise."""
    activation: bool | None = None
    """The older name of `use_activation`."""

    def items(self) -> list[ScoreRequest]:
        """The same as records."""
        texts = [self.input] if isinstance(self.input, str) else self.input
        return [ScoreRequest(str(position), "", text) for position, text in enumerate(texts)]

    def shown(self, reward: float) -> float:
        """The reward, through the sigmoid unless told otherwise."""
        wanted = self.use_activation if self.use_activation is not None else self.activation
        return reward if wanted is False else _sigmoid(reward)


class Usage(_Foreign):
    """Tokens, which this service does not count."""

    prompt_tokens: int = 0
    """Always 0."""
    total_tokens: int = 0
    """Always 0."""


class _ListResponse(_Foreign):
    """What vLLM's answers have in common."""

    id: str
    """Names nothing."""
    object: str = "list"
    """Always `list`."""
    created: int = 0
    """Always 0: the same question has the same answer."""
    model: str
    """The version of what scored."""
    usage: Usage = Usage()
    """Not counted."""


class ClassifyItem(_Foreign):
    """One text's answer."""

    index: int
    """Its position."""
    label: str | None = "LABEL_0"
    """The one label there is."""
    probs: list[FiniteFloat]
    """Its reward, alone."""
    num_classes: int = 1
    """Always 1."""


class ClassifyResponse(_ListResponse):
    """vLLM's answer to /classify."""

    data: list[ClassifyItem]
    """One entry a text."""


class PoolingItem(_Foreign):
    """One text's answer."""

    index: int
    """Its position."""
    object: str = "pooling"
    """Always `pooling`."""
    data: list[FiniteFloat]
    """Its reward, alone."""


class PoolingResponse(_ListResponse):
    """vLLM's answer to /pooling."""

    data: list[PoolingItem]
    """One entry a text."""


def _sigmoid(value: float) -> float:
    if value >= 0:
        return 1 / (1 + math.exp(-value))
    exponential = math.exp(value)
    return exponential / (1 + exponential)
