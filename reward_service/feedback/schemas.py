"""JSON schemas of human feedback and of the pairs that annotators are asked about."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, FiniteFloat, JsonValue, model_validator

from reward_service.http.schemas import finite_json

MAX_TEXT_CHARACTERS = 1_000_000
MAX_PAIRS = 1000
MAX_EXCEPTED = 50

Text = Annotated[str, Field(max_length=MAX_TEXT_CHARACTERS)]
Id = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:@-]{0,127}$")]
Annotator = Annotated[str, Field(max_length=100, pattern=r"^[^\s\x00-\x1f\x7f]([^\x00-\x1f\x7f]*[^\s\x00-\x1f\x7f])?$")]
"""A person's name, without control characters or white space at either end."""
Version = Annotated[str, Field(min_length=1, max_length=200)]


class _Message(BaseModel):
    """Strict mode: no unknown fields, no numbers as texts, only valid Unicode."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


class _Feedback(_Message):
    id: Id
    """Unique id that the sender chooses; sending it again changes nothing."""
    annotator: Annotator
    """Name of the annotator."""
    prompt: Text
    """The prompt."""
    policy_version: Version | None = None
    """Version of the policy that responded, if known; by default that of the pair."""


class Preference(_Feedback):
    """Which of two responses is better, in the order they were shown."""

    kind: Literal["preference"]
    """Always `preference`."""
    first: Text
    """The response shown first."""
    second: Text
    """The response shown second."""
    choice: Literal["first", "second", "tie", "skip"]
    """The better one; `tie`: neither is better; `skip`: no opinion."""
    pair: Id | None = None
    """Id of the candidate pair, if the question was about one."""

    @model_validator(mode="after")
    def _different(self) -> Preference:
        if self.first == self.second:
            raise ValueError("first and second are the same response")
        return self


class Rating(_Feedback):
    """A rating of one response."""

    kind: Literal["rating"]
    """Always `rating`."""
    response: Text
    """The rated response."""
    score: FiniteFloat
    """From `lowest` to `highest`."""
    lowest: FiniteFloat = 1.0
    """The worst score."""
    highest: FiniteFloat = 5.0
    """The best score."""

    @model_validator(mode="after")
    def _in_range(self) -> Rating:
        if not self.lowest < self.highest:
            raise ValueError(f"lowest ({self.lowest:g}) is not below highest ({self.highest:g})")
        if not self.lowest <= self.score <= self.highest:
            raise ValueError(f"score {self.score:g} is not between {self.lowest:g} and {self.highest:g}")
        return self


class Correction(_Feedback):
    """A better version of a response; it counts as preferred to the original."""

    kind: Literal["correction"]
    """Always `correction`."""
    response: Text
    """The original response."""
    corrected: Text
    """The corrected response."""

    @model_validator(mode="after")
    def _different(self) -> Correction:
        if self.response == self.corrected:
            raise ValueError("corrected is the same as response")
        return self


Feedback = Annotated[Preference | Rating | Correction, Field(discriminator="kind")]


class Receipt(_Message):
    """Confirms that feedback is stored durably."""

    id: str
    """The id of the feedback."""
    time: datetime
    """Time when the feedback (or its retraction) was first received, UTC."""


class CandidatePair(_Message):
    """Two responses to one prompt that annotators may be asked about."""

    id: Id
    """Id of the pair; adding it again only updates the reward model's opinion."""
    prompt: Text
    """The prompt."""
    first: Text
    """The first response."""
    second: Text
    """The second response."""
    policy_version: Version | None = None
    """Version of the policy that responded."""
    columns: Annotated[dict[str, JsonValue], AfterValidator(finite_json)] = Field(default_factory=dict)
    """The prompt's other data columns, for scorers; annotators don't see them."""
    first_reward: FiniteFloat | None = None
    """The reward model's reward of `first`, if known; annotators don't see it."""
    second_reward: FiniteFloat | None = None
    """The reward model's reward of `second`, if known."""
    uncertainty: Annotated[FiniteFloat, Field(ge=0)] | None = None
    """Disagreement of an ensemble of reward models on the pair, if there is an ensemble."""
    scorer_version: Version | None = None
    """Version of the reward model that gave these rewards, if known."""

    @model_validator(mode="after")
    def _different(self) -> CandidatePair:
        if self.first == self.second:
            raise ValueError("first and second are the same response")
        return self


class PairsRequest(_Message):
    """Candidate pairs to add: all of them, or none if one contradicts stored data."""

    pairs: list[CandidatePair] = Field(min_length=1, max_length=MAX_PAIRS)
    """The pairs."""


class PairsAdded(_Message):
    """How many pairs were added."""

    num_added: int
    """New pairs."""
    num_known: int
    """Pairs that were stored already."""


class ShownPair(_Message):
    """A pair as an annotator sees it; the order of the responses is drawn per annotator."""

    id: str
    """The pair's id."""
    prompt: str
    """The prompt."""
    first: str
    """The response to show first."""
    second: str
    """The response to show second."""
    policy_version: str | None
    """Version of the policy that responded."""


class Progress(_Message):
    """Progress of the annotator."""

    num_done: int
    """Pairs that the annotator has labelled or skipped."""
    num_left: int
    """Pairs that the annotator can still be asked about."""


class NextPair(_Message):
    """The next question for an annotator."""

    pair: ShownPair | None
    """The pair; null if none is left."""
    progress: Progress
    """Progress of the annotator."""
    store: str
    """Id of the store, so that a page does not send it feedback meant for another store."""


class Counts(_Message):
    """Counts of feedback by kind; undone feedback is only in `num_retracted`."""

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
    """Agreement of two annotators on the pairs that both labelled, without skips."""

    annotators: tuple[str, str]
    """Their names."""
    num_pairs: int
    """Pairs that both labelled."""
    raw: float
    """Share of them with the same label."""
    kappa: float | None
    """Cohen's kappa, the agreement beyond chance; null if it is undefined."""


class MeanAgreement(_Message):
    """Mean agreement over all pairs of annotators that share a candidate pair."""

    raw: float
    """Mean share of the same label."""
    kappa: float | None
    """Mean of the defined kappas."""


class Summary(_Message):
    """Summary of the store."""

    num_pairs: int
    """Candidate pairs."""
    num_pairs_labelled: int
    """Candidate pairs with at least one label other than a skip."""
    total: Counts
    """All feedback."""
    annotators: dict[str, Counts]
    """The feedback of each annotator."""
    agreement: list[PairAgreement]
    """Agreement of every two annotators that share a candidate pair."""
    mean_agreement: MeanAgreement | None
    """Mean agreement; null if no two annotators share a candidate pair."""
