"""The sections `[reward_service.scorers.NAME]`: the settings of each scorer kind.

A reference is an acceptable answer: the prompt's data has one value or a list of them in the column `references`.
Opens no file and imports neither torch nor ray.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import regex
from pydantic import AfterValidator, Field, model_validator

from cluster.config import Section, setting
from cluster.hub.download import local_model
from reward_service.config.composite import CompositeConfig

SCORER_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.-]*")


def _compiles(pattern: str) -> str:
    try:
        regex.compile(pattern)
    except regex.error as error:
        raise ValueError(f"{pattern!r} is not a regular expression: {error}") from None
    return pattern


def _valid_schema(schema: dict[str, Any]) -> dict[str, Any]:
    check_json_schema(schema)
    return schema


def check_json_schema(schema: Any) -> None:
    """Raise ValueError if it is not a JSON Schema, or refers to another document."""
    from jsonschema import SchemaError
    from jsonschema.validators import validator_for

    try:
        validator_for(schema).check_schema(schema)
    except SchemaError as error:
        raise ValueError(f"is not a JSON schema: {error.message}") from None
    for reference in _references(schema):
        if not reference.startswith("#"):
            raise ValueError(f"refers to {reference}, which is outside the schema: only references to # are allowed")


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


class ScorerSection(Section):
    """The settings of a scorer kind."""

    MEASURES: ClassVar[tuple[str, ...] | None] = None
    """Parts that every reward of the kind may have beside the reward itself; None if they are not known in advance."""

    NEEDS: ClassVar[tuple[str, ...]] = ()
    """Columns without which no item can be scored."""

    def measures(self) -> tuple[str, ...] | None:
        """Return `MEASURES`, or what these settings make of them."""
        return self.MEASURES

    def needs(self) -> tuple[str, ...]:
        """Return `NEEDS`, or what these settings make of them."""
        return self.NEEDS


class TrainedModelConfig(ScorerSection):
    """A trained reward model other than the run's own."""

    kind: Literal["reward_model"] = setting(..., may_change="recorded")
    path: Path = setting(..., may_change="recorded")
    """Folder of a Hugging Face sequence classifier with one label, or such a model of the Hub as `owner/name`."""

    def folder(self) -> Path:
        """Return the model's folder; downloads a model of the Hub."""
        return local_model(self.path)


class FunctionConfig(ScorerSection):
    """A Python function."""

    kind: Literal["function"] = setting(..., may_change="recorded")
    path: str = setting(..., may_change="recorded")
    """Dotted path `module:function`; `reward_service.functions.signatures` lists the signatures."""


class ExactConfig(ScorerSection):
    """1 if the answer is one of the references, else 0."""

    MEASURES = ("found",)
    NEEDS = ("references",)

    kind: Literal["exact"] = setting(..., may_change="recorded")
    answer: Pattern | None = setting(None, may_change="recorded")
    """Regular expression that finds the answer: the first group (or all) of its last match. If unset, the answer is the
    whole response."""
    ignore_case: bool = setting(False, may_change="recorded")
    """Ignore upper and lower case."""
    strip: bool = setting(True, may_change="recorded")
    """Ignore white space around answer and reference."""


class NumericConfig(ScorerSection):
    """1 if the answer is within the tolerance of one of the references, else 0."""

    MEASURES = ("found", "answer")
    NEEDS = ("references",)

    kind: Literal["numeric"] = setting(..., may_change="recorded")
    answer: Pattern | None = setting(None, may_change="recorded")
    """Regular expression that finds the number, as in `exact`. If unset, it is the last number of the response.
    Numbers may have signs (dashes and U+2212 too), grouped thousands, exponents, a percent sign, or be fractions. If
    only one of answer and reference is in percent, 50 % equals both 0.5 and 50."""
    tolerance: float = setting(0.0, may_change="recorded", ge=0)
    """Maximum difference that counts as equal."""
    relative_tolerance: float = setting(1e-9, may_change="recorded", ge=0)
    """Maximum difference as a share of the reference; the larger of the two applies."""


class MathConfig(ScorerSection):
    """1 if math-verify finds the response's last expression equal to one of the references, else 0.

    It is the content of the last `\\boxed{...}`, if there is one; else what follows "the final answer is" and the like;
    else the last expression in LaTeX or plain digits.
    """

    MEASURES = ("found",)
    NEEDS = ("references",)

    kind: Literal["math"] = setting(..., may_change="recorded")
    timeout_s: float = setting(5.0, may_change="always", gt=0)
    """Maximum CPU time of an item; a response that needs more gets 0. After three times this in wall-clock time, the
    item is an error, because the machine is the cause."""
    num_processes: int = setting(1, may_change="always", ge=1)
    """Child processes that compare."""


class RegexConfig(ScorerSection):
    """One reward if the response matches a pattern, another if it does not."""

    MEASURES = ("matched",)

    kind: Literal["regex"] = setting(..., may_change="recorded")
    pattern: Pattern = setting(..., may_change="recorded")
    """Regular expression."""
    match: Literal["search", "full"] = setting("search", may_change="recorded")
    """Whether the pattern may match anywhere or must match the whole response."""
    reward: float = setting(1.0, may_change="recorded")
    """Reward of a match."""
    otherwise: float = setting(0.0, may_change="recorded")
    """Reward of no match."""
    timeout_s: float = setting(1.0, may_change="always", gt=0)
    """Maximum time of the pattern on an item; a response that needs more does not match. If the machine had no CPU time
    for it, the item is an error."""


class LengthConfig(ScorerSection):
    """0 if the length is within the bounds, minus the penalty beyond them."""

    kind: Literal["length"] = setting(..., may_change="recorded")
    unit: Literal["characters", "words"] = setting("characters", may_change="recorded")
    """What is counted."""
    min: int = setting(0, may_change="recorded", ge=0)
    """Minimum length without a penalty."""
    max: int | None = setting(None, may_change="recorded", ge=0)
    """Maximum length without a penalty."""
    margin: int = setting(0, may_change="recorded", ge=0)
    """Units beyond a bound over which the penalty grows to its full value; 0 applies it at once."""
    penalty: float = setting(1.0, may_change="recorded", ge=0)
    """Maximum that is subtracted."""

    def measures(self) -> tuple[str, ...]:
        """Return the name of the measured length."""
        return (f"num_{self.unit}",)

    @model_validator(mode="after")
    def _bounds(self) -> LengthConfig:
        if not self.min and self.max is None:
            raise ValueError("min, max: give one of them")
        if self.max is not None and self.max < self.min:
            raise ValueError(f"max: {self.max} is less than min, {self.min}")
        return self


class TruncationConfig(ScorerSection):
    """0 if the response is complete, minus the penalty if it was cut off.

    The column `finish_reason` decides if the data has it ("length" is cut off); otherwise the last character decides.
    """

    MEASURES = ("cut_off",)

    kind: Literal["truncation"] = setting(..., may_change="recorded")
    penalty: float = setting(1.0, may_change="recorded", ge=0)
    """What is subtracted."""
    endings: str = setting(".!?…。！？\"'”’»)]}`", may_change="recorded", min_length=1)
    """Characters that end a complete response, ignoring white space."""


class JsonSchemaConfig(ScorerSection):
    """1 if the response, or its last fenced block, is JSON that the schema allows, else 0."""

    MEASURES = ("parsed",)

    kind: Literal["json_schema"] = setting(..., may_change="recorded")
    json_schema: Annotated[dict[str, Any], AfterValidator(_valid_schema)] | None = setting(None, may_change="recorded")
    """The schema as a table."""
    path: Path | None = setting(None, may_change="recorded")
    """File with the schema, instead of a table."""
    timeout_s: float = setting(5.0, may_change="always", gt=0)
    """Maximum CPU time of an item; a response that needs more gets 0. After three times this in wall-clock time, the
    item is an error, because the machine is the cause."""

    @model_validator(mode="after")
    def _one(self) -> JsonSchemaConfig:
        if (self.json_schema is None) == (self.path is None):
            raise ValueError("json_schema, path: give one of them")
        return self


class RepetitionConfig(ScorerSection):
    """Minus the penalty times the share of n-grams that occurred before."""

    MEASURES = ("repeated_share",)

    kind: Literal["repetition"] = setting(..., may_change="recorded")
    n: int = setting(4, may_change="recorded", ge=1)
    """Length of the n-grams."""
    unit: Literal["characters", "words"] = setting("words", may_change="recorded")
    """What n-grams are made of."""
    penalty: float = setting(1.0, may_change="recorded", ge=0)
    """What is subtracted if every n-gram is a repetition."""


class LanguageConfig(ScorerSection):
    """1 if py3langid identifies the response as the language, else 0; a response without letters gets 0."""

    MEASURES = ("probability",)

    kind: Literal["language"] = setting(..., may_change="recorded")
    language: str = setting(..., may_change="recorded", pattern=r"^[a-z]{2,3}$")
    """ISO 639 code of the expected language."""
    among: tuple[str, ...] = setting((), may_change="recorded")
    """Languages to choose from; all known languages if empty."""

    @model_validator(mode="after")
    def _expected_is_possible(self) -> LanguageConfig:
        if self.among and self.language not in self.among:
            raise ValueError(f"among: lacks the expected language, {self.language}")
        return self


class CodeConfig(ScorerSection):
    """The share of unit tests that the response's Python code passes, run in a sandboxed child process.

    The code is the last fenced block that is marked as Python, else the last one, else the whole response. A test is
    Python source that raises if the code is wrong; it sees what the code defined. The child is one process without
    network or files.
    """

    MEASURES = ("num_tests", "num_passed")

    kind: Literal["code"] = setting(..., may_change="recorded")
    tests: str = setting("references", may_change="recorded")
    """Column with the item's tests: a source text, or a list of them."""
    all_or_nothing: bool = setting(False, may_change="recorded")
    """One failed test makes the reward 0."""
    cpu_s: int = setting(5, may_change="recorded", ge=1)
    """CPU time of an item; tests that have not passed by then have failed."""
    wall_s: float = setting(15.0, may_change="always", gt=0)
    """Wall-clock time of an item. Tests that have not passed by then have failed, as the code sleeps or waits; but if
    the machine was so busy that it could not give the code its CPU time, the item is an error."""
    memory_mb: int = setting(512, may_change="recorded", ge=64)
    """Address space of the child process."""
    max_threads: int = setting(16, may_change="recorded", ge=1)
    """Threads of the child process."""
    scratch_mb: int = setting(16, may_change="recorded", ge=1)
    """Size of the in-memory folder that the child process may write to."""
    num_processes: int = setting(2, may_change="always", ge=1)
    """Items judged concurrently."""

    def needs(self) -> tuple[str, ...]:
        """Return the column of tests."""
        return (self.tests,)

    @model_validator(mode="after")
    def _clock(self) -> CodeConfig:
        if self.wall_s < self.cpu_s:
            raise ValueError(f"wall_s: {self.wall_s:g} is less than cpu_s, {self.cpu_s}")
        return self


class ForbiddenConfig(ScorerSection):
    """1 if the response has nothing forbidden, else 0; the part `violation` is the opposite.

    Phrases are found as whole words, regardless of case, white space and invisible characters.
    """

    MEASURES = ("num_forbidden", "violation")

    kind: Literal["forbidden"] = setting(..., may_change="recorded")
    phrases: tuple[Annotated[str, Field(pattern=r"\S")], ...] = setting((), may_change="recorded")
    """Forbidden phrases."""
    path: Path | None = setting(None, may_change="recorded")
    """Text file with more phrases, one a line."""
    function: str | None = setting(None, may_change="recorded")
    """Dotted path of a function as in `function`; the response is forbidden too if it returns 0 or less."""
    turns: Literal["all", "last"] = setting("all", may_change="recorded")
    """After a conversation (column `conversation`): look for phrases in all of the policy's messages, or in its last
    response only."""

    def measures(self) -> tuple[str, ...] | None:
        """Return None if there is a function, whose parts are not known in advance."""
        return None if self.function is not None else self.MEASURES

    @model_validator(mode="after")
    def _something(self) -> ForbiddenConfig:
        if not self.phrases and self.path is None and self.function is None:
            raise ValueError("phrases, path, function: give one of them")
        return self


class JudgeConfig(ScorerSection):
    """A language model's score, requested from an OpenAI-compatible endpoint."""

    MEASURES = ("opinion",)

    kind: Literal["judge"] = setting(..., may_change="recorded")
    url: str = setting(..., may_change="recorded", pattern=r"^https?://[^\s/]+(/[^\s]*)?$")
    """Base URL of the endpoint, such as http://127.0.0.1:8000/v1."""
    model: str = setting(..., may_change="recorded", min_length=1)
    """Name of the model at the endpoint."""
    rubric: str = setting(..., may_change="recorded")
    """Prompt of the judge; {prompt}, {response} and, if the data has one, {reference} are filled in."""
    system: str | None = setting(None, may_change="recorded")
    """System message before the rubric."""
    api_key_variable: str | None = setting(None, may_change="always", min_length=1)
    """Environment variable with the endpoint's key."""
    temperature: float = setting(0.0, may_change="recorded", ge=0)
    """Sampling temperature of the judge."""
    max_tokens: int = setting(256, may_change="recorded", ge=1)
    """Maximum tokens of an answer."""
    pattern: Pattern | None = setting(None, may_change="recorded")
    """Regular expression that finds the number: the first group (or all) of its last match. If unset, it is the number
    behind the last word score, rating, grade, mark or verdict, else the last one before `/10` or `out of 10`, else the
    only one; Markdown is ignored, and numbers that describe the scale (1 to 10, maximum 10) do not count."""
    json_field: str | None = setting(None, may_change="recorded")
    """Field with the number, if the answer is a JSON object; used instead of the pattern."""
    low: float | None = setting(None, may_change="recorded")
    """Minimum number; with `high`, rewards are scaled from [low, high] to [0, 1]."""
    high: float | None = setting(None, may_change="recorded")
    """Maximum number."""
    max_concurrent: int = setting(8, may_change="always", ge=1)
    """Concurrent requests."""
    timeout_s: float = setting(30.0, may_change="always", gt=0)
    """Deadline of one item, retries included."""
    max_attempts: int = setting(4, may_change="always", ge=1)
    """Attempts for an item if the endpoint cannot be reached, is busy (429) or fails (5xx)."""

    def needs(self) -> tuple[str, ...]:
        """Return the column of references if the rubric shows it."""
        return ("references",) if "{reference}" in self.rubric else ()

    @model_validator(mode="after")
    def _fits(self) -> JudgeConfig:
        if "{response}" not in self.rubric:
            raise ValueError("rubric: lacks the placeholder {response}")
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
    """Return all settings except file paths as sorted JSON, which a scorer's version digests."""
    files = {name for name, value in config if isinstance(value, Path)}
    return json.dumps(config.model_dump(mode="json", exclude=files), sort_keys=True)
