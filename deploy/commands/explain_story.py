"""One conversation as it is told to a person: its parts in order, with what training made of the policy's tokens.

Plain data and a few sentences; knows neither terminals nor pages nor where the numbers come from.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from cluster.trajectory import Trajectory
from deploy.commands.inspect import Decode

CONTEXT_TOKENS = 8
"""How many tokens before it a token is decoded with: some tokenizers write a space according to what precedes."""


class Numbers(Protocol):
    """[T] each, of a whole trajectory."""

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
    """One that the policy sampled: what its critic expected, how much better it was, and how likely it was made."""

    text: str
    value: float
    advantage: float
    before: float
    change: float
    """Of its log-probability, by the step."""


@dataclass(frozen=True, slots=True)
class Part:
    """What was said without a change of speaker. Only turns of the policy have a number, tokens and a reward."""

    text: str
    turn: int | None = None
    reward: float | None = None
    tokens: Sequence[Token] = ()

    @property
    def is_sampled(self) -> bool:
        """Whether the policy said it."""
        return self.turn is not None

    def heading(self) -> str:
        """Who speaks, and what it was worth."""
        if self.turn is None:
            return "given"
        reward = "" if self.reward is None else f", reward {self.reward:g}"
        return f"turn {self.turn}: {len(self.tokens)} token{'' if len(self.tokens) == 1 else 's'}{reward}"


@dataclass(frozen=True, slots=True)
class Story:
    """A whole conversation. `same` says how the weights that it was trained from compare with the recorded ones."""

    run: str
    trajectory: Trajectory
    parts: Sequence[Part]
    same: str

    def heading(self) -> str:
        """Which one it is."""
        trajectory = self.trajectory
        versions = sorted({segment.policy_version for segment in trajectory.segments if segment.length})
        sampled = f"sampled by version {', '.join(map(str, versions))}"
        return f"{self.run}: {trajectory.uid} of task {trajectory.task}, trained in step {trajectory.step}, {sampled}"

    def ends(self) -> Iterator[str]:
        """How it ended and what it was worth, a line each."""
        trajectory = self.trajectory
        by_turn = sum(turn.reward or 0.0 for turn in trajectory.turns)
        yield f"ended: {'by itself' if trajectory.finish_reason == 'stop' else trajectory.finish_reason}"
        at_end = trajectory.reward or 0.0
        yield f"reward {by_turn + at_end:g}: {by_turn:g} turn by turn, {at_end:g} at the end"
        for name, value in trajectory.reward_parts.items():
            yield f"  {name} {value:g}"


def parts_of(trajectory: Trajectory, numbers: Numbers, decode: Decode) -> list[Part]:
    """The parts of a trajectory, in order."""
    parts, end = list[Part](), 0
    for number, turn in enumerate(trajectory.turns, start=1):
        if turn.start > end:
            parts.append(Part(decode(trajectory.token_ids[end : turn.start])))
        end = turn.start + turn.length
        tokens = [_token(trajectory, place, numbers, decode) for place in range(turn.start, end)]
        parts.append(Part(decode(trajectory.token_ids[turn.start : end]), number, turn.reward, tokens))
    if end < len(trajectory.token_ids):
        parts.append(Part(decode(trajectory.token_ids[end:])))
    return parts


def _token(trajectory: Trajectory, place: int, numbers: Numbers, decode: Decode) -> Token:
    ids = trajectory.token_ids[max(0, place - CONTEXT_TOKENS) : place + 1]
    before, whole = decode(ids[:-1]) if ids[:-1] else "", decode(ids)
    text = whole.removeprefix(before) if whole.startswith(before) else decode(ids[-1:])
    was, now = numbers.before[place], numbers.after[place]
    return Token(text, numbers.values[place], numbers.advantages[place], was, now - was)
