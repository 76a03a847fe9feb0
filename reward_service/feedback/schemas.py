"""What people say of responses and what they are asked, as JSON and as records. Knows neither store nor transport."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, FiniteFloat, JsonValue, model_validator

MAX_TEXT_CHARACTERS = 1_000_000
MAX_PAIRS = 1000
MAX_EXCEPTED = 50


def _finite(columns: dict[str, JsonValue]) -> dict[str, JsonValue]:
    json.dumps(columns, allow_nan=False)
    return columns


Text = Annotated[str, Field(max_length=MAX_TEXT_CHARACTERS)]
Id = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:@-]{0,127}$")]
Annotator = Annotated[str, Field(max_length=100, pattern=r"^[^\s\x00-\x1f\x7f]([^\x00-\x1f\x7f]*[^\s\x00-\x1f\x7f])?$")]
"""A person's name: no control characters, no space at either end."""
Version = Annotated[str, Field(min_length=1, max_length=200)]


class _Message(BaseModel):
    """Nothing beside the fields, no number as a text, and texts of valid Unicode alone: strict mode sees to that."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


class _Feedback(_Message):
    id: Id
    """Chosen by who sends it, once: sent again it changes nothing."""
    annotator: Annotator
    """Who says so."""
    prompt: Text
    """What was asked."""
    policy_version: Version | None = None
    """The policy that answered, where it is known; that of the pair unless given."""


class Preference(_Feedback):
    """Which of two responses is better, in the order in which they were shown."""

    kind: Literal["preference"]
    """Always `preference`."""
    first: Text
    """The response shown first."""
    second: Text
    """The response shown second."""
    choice: Literal["first", "second", "tie", "skip"]
    """The better one; `tie`: neither is better; `skip`: no opinion."""
    pair: Id | None = None
    """The candidate pair that was asked about, where there is one."""

    @model_validator(mode="after")
    def _different(self) -> Preference:
        if self.first == self.second:
            raise ValueError("first and second are the same response")
        return self


class Rating(_Feedback):
    """How good one response is."""

    kind: Literal["rating"]
    """Always `rating`."""
    response: Text
    """What is rated."""
    score: FiniteFloat
    """From `lowest` to `highest`."""
    lowest: FiniteFloat = 1.0
    """The worst there is."""
    highest: FiniteFloat = 5.0
    """The best there is."""

    @model_validator(mode="after")
    def _in_range(self) -> Rating:
        if not self.lowest < self.highest:
            raise ValueError(f"lowest ({self.lowest:g}) is not below highest ({self.highest:g})")
        if not self.lowest <= self.score <= self.highest:
            raise ValueError(f"score {self.score:g} is not between {self.lowest:g} and {self.highest:g}")
        return self


class Correction(_Feedback):
    """What the response should have been: preferred to what it was."""

    kind: Literal["correction"]
    """Always `correction`."""
    response: Text
    """What was answered."""
    corrected: Text
    """What should have been."""

    @model_validator(mode="after")
    def _different(self) -> Correction:
        if self.response == self.corrected:
            raise ValueError("corrected is the same as response")
        return self


Feedback = Annotated[Preference | Rating | Correction, Field(discriminator="kind")]


class Receipt(_Message):
    """Stored for good."""

    id: str
    """The id of the feedback."""
    time: datetime
    """When it was first received (a retraction: when that was), UTC."""


class CandidatePair(_Message):
    """Two responses to one prompt that annotators may be asked about."""

    id: Id
    """Names the pair; added again it changes nothing but what the reward model says of it."""
    prompt: Text
    """What was asked."""
    first: Text
    """One response."""
    second: Text
    """The other one."""
    policy_version: Version | None = None
    """The policy that answered."""
    columns: Annotated[dict[str, JsonValue], AfterValidator(_finite)] = Field(default_factory=dict)
    """The prompt's other data columns, for scorers; annotators don't see them."""
    first_reward: FiniteFloat | None = None
    """The reward model's opinion of `first`, where it has one; annotators don't see it."""
    second_reward: FiniteFloat | None = None
    """The same of `second`."""
    uncertainty: Annotated[FiniteFloat, Field(ge=0)] | None = None
    """How far an ensemble of reward models is divided on the pair, where there is one."""
    scorer_version: Version | None = None
    """The version of the reward model that says so, where it is known."""

    @model_validator(mode="after")
    def _different(self) -> CandidatePair:
        if self.first == self.second:
            raise ValueError("first and second are the same response")
        return self


class PairsRequest(_Message):
    """Candidate pairs to add: all of them, or none where one contradicts what is stored."""

    pairs: list[CandidatePair] = Field(min_length=1, max_length=MAX_PAIRS)
    """The pairs."""


class PairsAdded(_Message):
    """What became of the pairs."""

    num_added: int
    """Pairs that were new."""
    num_known: int
    """Pairs that were there already."""


class ShownPair(_Message):
    """A pair as this annotator is to see it: which response comes first is drawn anew for everyone."""

    id: str
    """The pair's id."""
    prompt: str
    """What was asked."""
    first: str
    """The response to show first."""
    second: str
    """The response to show second."""
    policy_version: str | None
    """The policy that answered."""


class Progress(_Message):
    """How far this annotator is."""

    num_done: int
    """Pairs this annotator has labelled or skipped."""
    num_left: int
    """Pairs there are still to ask this annotator."""


class NextPair(_Message):
    """What to ask an annotator next."""

    pair: ShownPair | None
    """The pair; null when there is none left to ask."""
    progress: Progress
    """How far the annotator is."""
    store: str
    """Names the store: what was meant for another one is not sent to this one."""


class Counts(_Message):
    """Feedback that counts, by kind; what was undone is in `num_retracted` alone."""

    num_preferences: int = 0
    """Preferences for one of two responses."""
    num_ties: int = 0
    """Pairs called a tie."""
    num_skips: int = 0
    """Pairs skipped."""
    num_ratings: int = 0
    """Ratings."""
    num_corrections: int = 0
    """Corrections."""
    num_retracted: int = 0
    """Feedback that was undone."""


class PairAgreement(_Message):
    """Of two annotators, over the pairs that both labelled; skips left out."""

    annotators: tuple[str, str]
    """Their names."""
    num_pairs: int
    """Pairs that both labelled."""
    raw: float
    """Share of them with the same label."""
    kappa: float | None
    """Cohen's kappa: agreement beyond chance; null where chance alone would agree always."""


class MeanAgreement(_Message):
    """The mean over all two annotators that share a pair, each two counted once."""

    raw: float
    """Mean share of the same label."""
    kappa: float | None
    """Mean of the kappas there are."""


class Summary(_Message):
    """What the store holds."""

    num_pairs: int
    """Candidate pairs."""
    num_pairs_labelled: int
    """Candidate pairs with at least one label other than a skip."""
    total: Counts
    """All feedback."""
    annotators: dict[str, Counts]
    """The feedback of each annotator."""
    agreement: list[PairAgreement]
    """Of every two annotators that labelled a pair both."""
    mean_agreement: MeanAgreement | None
    """Over all of them; null where no two annotators share a pair."""
