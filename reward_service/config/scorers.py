"""The sections `[reward_service.scorers.NAME]`: one for each kind of scorer. Knows no scorer and opens no file.

Imports neither torch nor ray. A reference is what the prompt's data has in its column `references`: a value, or a
list of acceptable ones.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import regex
from pydantic import AfterValidator, Field, model_validator

from cluster.config import Section
from reward_service.config.composite import CompositeConfig

SCORER_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.-]*")


def _compiles(pattern: str) -> str:
    try:
        regex.compile(pattern)
    except regex.error as error:
        raise ValueError(f"{pattern!r} is no regular expression: {error}") from None
    return pattern


def _valid_schema(schema: dict[str, Any]) -> dict[str, Any]:
    check_json_schema(schema)
    return schema


def check_json_schema(schema: Any) -> None:
    """Raise ValueError for what is no JSON Schema, or one that refers to another document."""
    from jsonschema import SchemaError
    from jsonschema.validators import validator_for

    try:
        validator_for(schema).check_schema(schema)
    except SchemaError as error:
        raise ValueError(f"is no JSON schema: {error.message}") from None
    for reference in _references(schema):
        if not reference.startswith("#"):
            raise ValueError(f"refers to {reference}, which is not in the schema: nothing is fetched")


def _references(schema: Any) -> Iterable[str]:
    if isinstance(schema, list):
        for item in schema:
            yield from _references(item)
    elif isinstance(schema, Mapping):
        for key, value in schema.items():
            if key in ("$ref", "$dynamicRef") and isinstance(value, str):
                yield value
            else:
                yield from _references(value)


Pattern = Annotated[str, Field(min_length=1), AfterValidator(_compiles)]


class TrainedModelConfig(Section):
    """A trained reward model other than the run's own."""

    kind: Literal["reward_model"]
    path: Path
    """Folder of a Hugging Face sequence classifier with one label."""


class FunctionConfig(Section):
    """A Python function."""

    kind: Literal["function"]
    path: str
    """Dotted path `module:function`; the signatures are in `reward_service.scorers.signatures`."""


class ExactConfig(Section):
    """1 where the answer is one of the references, else 0."""

    kind: Literal["exact"]
    answer: Pattern | None = None
    """Regular expression that finds the answer: the first group (or all) of its last match; without one the answer is
    the whole response."""
    ignore_case: bool = False
    """Whether upper and lower case are the same."""
    strip: bool = True
    """Whether white space around answer and reference is ignored."""


class NumericConfig(Section):
    """1 where the answer is within the tolerance of one of the references, else 0."""

    kind: Literal["numeric"]
    answer: Pattern | None = None
    """Regular expression that finds the number, as in `exact`; without one it is the last number of the response."""
    tolerance: float = Field(default=0.0, ge=0)
    """Largest difference that counts as equal."""
    relative_tolerance: float = Field(default=1e-9, ge=0)
    """The same as a share of the reference; the larger of the two holds."""


class MathConfig(Section):
    """1 where math-verify finds the response's last expression equal to one of the references, else 0."""

    kind: Literal["math"]
    timeout_s: float = Field(default=5.0, gt=0)
    """Longest an item may take; one that takes longer is an error."""
    num_processes: int = Field(default=1, ge=1)
    """Child processes that compare."""


class RegexConfig(Section):
    """A reward where the response matches a pattern, another where it does not."""

    kind: Literal["regex"]
    pattern: Pattern
    """Regular expression."""
    match: Literal["search", "full"] = "search"
    """Whether the pattern may be anywhere or has to be the whole response."""
    reward: float = 1.0
    """Reward of a match."""
    otherwise: float = 0.0
    """Reward without one."""
    timeout_s: float = Field(default=1.0, gt=0)
    """Longest the pattern may be tried on an item; one that takes longer is an error."""


class LengthConfig(Section):
    """0 within the bounds, minus the penalty beyond them."""

    kind: Literal["length"]
    unit: Literal["characters", "words"] = "characters"
    """What is counted."""
    min: int = Field(default=0, ge=0)
    """Shortest length without a penalty."""
    max: int | None = Field(default=None, ge=0)
    """Longest length without a penalty."""
    margin: int = Field(default=0, ge=0)
    """Over how many units beyond a bound the penalty grows to its whole; 0 is at once."""
    penalty: float = Field(default=1.0, ge=0)
    """What is taken away at most."""

    @model_validator(mode="after")
    def _bounds(self) -> LengthConfig:
        if not self.min and self.max is None:
            raise ValueError("min, max: give one of them")
        if self.max is not None and self.max < self.min:
            raise ValueError(f"max: {self.max} is less than min, {self.min}")
        return self


class TruncationConfig(Section):
    """0 where the response came to its end, minus the penalty where it was cut off.

    The data's column `finish_reason` tells where it is given ("length" is cut off); else the last character does.
    """

    kind: Literal["truncation"]
    penalty: float = Field(default=1.0, ge=0)
    """What is taken away."""
    endings: str = Field(default=".!?…。！？\"'”’»)]}`", min_length=1)
    """Characters that a whole response ends with, white space aside."""


class JsonSchemaConfig(Section):
    """1 where the response is JSON that the schema allows, else 0; of fenced blocks the last is read."""

    kind: Literal["json_schema"]
    json_schema: Annotated[dict[str, Any], AfterValidator(_valid_schema)] | None = None
    """The schema as a table."""
    path: Path | None = None
    """A file with the schema, instead."""
    timeout_s: float = Field(default=5.0, gt=0)
    """Longest an item may take; one that takes longer is an error."""

    @model_validator(mode="after")
    def _one(self) -> JsonSchemaConfig:
        if (self.json_schema is None) == (self.path is None):
            raise ValueError("json_schema, path: give one of them")
        return self


class RepetitionConfig(Section):
    """Minus the penalty times the share of n-grams that were there before."""

    kind: Literal["repetition"]
    n: int = Field(default=4, ge=1)
    """Length of the n-grams."""
    unit: Literal["characters", "words"] = "words"
    """What they are made of."""
    penalty: float = Field(default=1.0, ge=0)
    """What is taken away where all is repetition."""


class LanguageConfig(Section):
    """1 where py3langid takes the response for the language, else 0; without letters it is none."""

    kind: Literal["language"]
    language: str = Field(pattern=r"^[a-z]{2,3}$")
    """Expected language, by its ISO 639 code."""
    among: tuple[str, ...] = ()
    """Languages it may be taken for; all that are known unless given."""

    @model_validator(mode="after")
    def _expected_is_possible(self) -> LanguageConfig:
        if self.among and self.language not in self.among:
            raise ValueError(f"among: lacks the expected language, {self.language}")
        return self


class CodeConfig(Section):
    """The share of unit tests that the response's Python code passes, run in a confined child process.

    The code is the last fenced block or the whole response. A test is Python source that raises where the code is
    wrong; it sees what the code defined. The child is one process without network or files.
    """

    kind: Literal["code"]
    tests: str = "references"
    """Column with the item's tests: a source, or a list of them."""
    all_or_nothing: bool = False
    """Whether one failed test makes the reward 0."""
    cpu_s: int = Field(default=5, ge=1)
    """CPU time of an item; what is not passed by then is failed."""
    wall_s: float = Field(default=15.0, gt=0)
    """Time on the clock of an item; one that takes longer is an error, for the machine may be to blame."""
    memory_mb: int = Field(default=512, ge=64)
    """Address space of the child."""
    max_threads: int = Field(default=16, ge=1)
    """Threads of the child."""
    scratch_mb: int = Field(default=16, ge=1)
    """Size of the folder that the child may write to, which is in memory."""
    num_processes: int = Field(default=2, ge=1)
    """Items judged at a time."""

    @model_validator(mode="after")
    def _clock(self) -> CodeConfig:
        if self.wall_s < self.cpu_s:
            raise ValueError(f"wall_s: {self.wall_s:g} is less than cpu_s, {self.cpu_s}")
        return self


class ForbiddenConfig(Section):
    """1 where the response has nothing forbidden, 0 where it has; the part `violation` is the other way round.

    Phrases are found as whole words, whatever their case, white space and invisible characters.
    """

    kind: Literal["forbidden"]
    phrases: tuple[Annotated[str, Field(pattern=r"\S")], ...] = ()
    """What may not be said."""
    path: Path | None = None
    """A text file with more of them, a line each."""
    function: str | None = None
    """Dotted path of a function as in `function`; where it gives 0 or less the response is forbidden too."""
    turns: Literal["all", "last"] = "all"
    """After a conversation (column `conversation`): whether phrases are looked for in all that the policy said in it,
    as its assistant, or in the last response alone."""

    @model_validator(mode="after")
    def _something(self) -> ForbiddenConfig:
        if not self.phrases and self.path is None and self.function is None:
            raise ValueError("phrases, path, function: give one of them")
        return self


class JudgeConfig(Section):
    """A language model's opinion, asked of an OpenAI-compatible endpoint."""

    kind: Literal["judge"]
    url: str = Field(pattern=r"^https?://[^\s/]+(/[^\s]*)?$")
    """The endpoint's base, such as http://127.0.0.1:8000/v1."""
    model: str = Field(min_length=1)
    """Name of the model there."""
    rubric: str
    """What it is asked, with {prompt}, {response} and, where the data has one, {reference} in their places."""
    system: str | None = None
    """A system message before it."""
    api_key_variable: str | None = Field(default=None, min_length=1)
    """Environment variable with the endpoint's key."""
    temperature: float = Field(default=0.0, ge=0)
    """Temperature it is sampled with."""
    max_tokens: int = Field(default=256, ge=1)
    """Longest opinion."""
    pattern: Pattern = r"(?i:score)\W{0,3}(-?\d+(?:\.\d+)?)"
    """Regular expression that finds the number: the first group (or all) of its last match."""
    json_field: str | None = None
    """Instead of the pattern: the opinion is a JSON object, and this its field with the number."""
    low: float | None = None
    """Least number that it may give; with `high`, rewards are scaled from [low, high] to [0, 1]."""
    high: float | None = None
    """Greatest number that it may give."""
    max_concurrent: int = Field(default=8, ge=1)
    """Questions under way at a time."""
    timeout_s: float = Field(default=30.0, gt=0)
    """Deadline of one item, repeats included."""
    max_attempts: int = Field(default=4, ge=1)
    """Times an item is asked where the endpoint can't be reached, is busy (429) or failed (5xx)."""

    @model_validator(mode="after")
    def _fits(self) -> JudgeConfig:
        if "{response}" not in self.rubric:
            raise ValueError("rubric: has no {response} in it")
        if (self.low is None) != (self.high is None):
            raise ValueError("low, high: give both or neither")
        if self.low is not None and self.high is not None and self.high <= self.low:
            raise ValueError(f"high: {self.high:g} is not above low, {self.low:g}")
        return self


ScorerConfig = Annotated[
    TrainedModelConfig
    | FunctionConfig
    | ExactConfig
    | NumericConfig
    | MathConfig
    | RegexConfig
    | LengthConfig
    | TruncationConfig
    | JsonSchemaConfig
    | RepetitionConfig
    | LanguageConfig
    | CodeConfig
    | ForbiddenConfig
    | JudgeConfig
    | CompositeConfig,
    Field(discriminator="kind"),
]


def settings_text(config: Section) -> str:
    """All settings of a section but where its files lie, defaults included, in one order: what a version digests."""
    files = {name for name, value in config if isinstance(value, Path)}
    return json.dumps(config.model_dump(mode="json", exclude=files), sort_keys=True)
