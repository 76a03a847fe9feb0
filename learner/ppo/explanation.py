"""Explains how one trajectory was trained, token by token, as plain numbers."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from learner.ppo.experience import Experience


@dataclass(frozen=True, slots=True)
class Explanation:
    """The numbers of one trajectory, [T] each, 0 on tokens that the policy did not sample.

    `values` and `advantages` are those of the training, `before` and `after` the log-probabilities around the step.
    """

    values: list[float]
    advantages: list[float]
    before: list[float]
    after: list[float]


class Watched:
    """Keeps the numbers of the trajectory `uid` from its step's experience."""

    def __init__(self, uid: str) -> None:
        self._uid = uid
        self._kept: list[list[float]] = []

    def keep(self, experience: Experience) -> None:
        """Keep the trajectory's part of the step's experience."""
        row = experience.batch.uids.index(self._uid)
        length, mask = experience.batch.lengths[row], experience.batch.mask[row]
        kept = (experience.values[row], experience.advantages[row], experience.proximal[row])
        self._kept = [(tensor * mask)[:length].tolist() for tensor in kept]

    def explained(self, after: Tensor) -> Explanation:
        """Return the explanation, given the log-probabilities after the step."""
        values, advantages, before = self._kept
        return Explanation(values, advantages, before, after.tolist())
