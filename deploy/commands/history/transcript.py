"""Split a trajectory into a transcript: spans of text, with values of the policy's tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from cluster.trajectory import Trajectory
from deploy.commands.history.inspect import Decode

CONTEXT_TOKENS = 8
"""Number of preceding tokens that each token is decoded with; in some tokenizers they decide on a leading space."""


class TokenValues(Protocol):
    """Values of a trajectory's tokens, [T] each; `before` and `after` the step are log-probabilities."""

    @property
    def values(self) -> Sequence[float]: ...
    @property
    def advantages(self) -> Sequence[float]: ...
    @property
    def before(self) -> Sequence[float]: ...
    @property
    def after(self) -> Sequence[float]: ...


@dataclass(frozen=True, slots=True)
class Token:
    """A token that the policy sampled, with value, advantage and log-probability before the step."""

    text: str
    value: float
    advantage: float
    before: float
    change: float
    """Change of the log-probability by the step."""


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive text of one speaker. Only turns of the policy have a turn number, tokens and a reward."""

    text: str
    turn: int | None = None
    reward: float | None = None
    tokens: Sequence[Token] = ()

    @property
    def is_sampled(self) -> bool:
        """Return whether the policy sampled this span."""
        return self.turn is not None

    def heading(self) -> str:
        """Return a heading with the speaker and the reward."""
        if self.turn is None:
            return "given"
        reward = "" if self.reward is None else f", reward {self.reward:g}"
        return f"turn {self.turn}: {len(self.tokens)} token{'' if len(self.tokens) == 1 else 's'}{reward}"


@dataclass(frozen=True, slots=True)
class Transcript:
    """A conversation; `comparison` says how the weights before its step differ from the recorded ones."""

    run: str
    trajectory: Trajectory
    spans: Sequence[Span]
    comparison: str

    def heading(self) -> str:
        """Return a line that identifies the conversation."""
        trajectory = self.trajectory
        versions = sorted({segment.policy_version for segment in trajectory.segments if segment.length})
        sampled = f"sampled by version {', '.join(map(str, versions))}"
        return f"{self.run}: {trajectory.uid} of task {trajectory.task}, trained in step {trajectory.step}, {sampled}"

    def summary(self) -> Iterator[str]:
        """Yield the finish reason, the total reward and each part of the reward, one line each."""
        trajectory = self.trajectory
        by_turn = sum(turn.reward or 0.0 for turn in trajectory.turns)
        yield f"finish reason: {trajectory.finish_reason}"
        at_end = trajectory.reward or 0.0
        yield f"reward {by_turn + at_end:g}: {by_turn:g} from turns, {at_end:g} at the end"
        for name, value in trajectory.reward_parts.items():
            yield f"  {name} {value:g}"


def spans_of(trajectory: Trajectory, values: TokenValues, decode: Decode) -> list[Span]:
    """Split a trajectory into spans, in order."""
    spans, end = list[Span](), 0
    for number, turn in enumerate(trajectory.turns, start=1):
        if turn.start > end:
            spans.append(Span(decode(trajectory.token_ids[end : turn.start])))
        end = turn.start + turn.length
        tokens = [_token(trajectory, position, values, decode) for position in range(turn.start, end)]
        spans.append(Span(decode(trajectory.token_ids[turn.start : end]), number, turn.reward, tokens))
    if end < len(trajectory.token_ids):
        spans.append(Span(decode(trajectory.token_ids[end:])))
    return spans


def _token(trajectory: Trajectory, position: int, values: TokenValues, decode: Decode) -> Token:
    ids = [*trajectory.tokens_before(position)[-CONTEXT_TOKENS:], trajectory.token_ids[position]]
    context, whole = decode(ids[:-1]) if ids[:-1] else "", decode(ids)
    text = whole.removeprefix(context) if whole.startswith(context) else decode(ids[-1:])
    before, after = values.before[position], values.after[position]
    return Token(text, values.values[position], values.advantages[position], before, after - before)
