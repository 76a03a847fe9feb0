"""What a step made of one trajectory, token by token, for whoever wants to know why it was trained as it was.

Plain numbers that travel. Knows neither how they were computed nor how they are shown.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from learner.ppo.experience import Experience


@dataclass(frozen=True, slots=True)
class Explanation:
    """[T] each, 0 where others spoke. `before` and `after` are the log-probabilities around the step, `values` and
    `advantages` those that it was trained with."""

    values: list[float]
    advantages: list[float]
    before: list[float]
    after: list[float]


class Watched:
    """Keeps of a step's experience what belongs to the trajectory `uid`, which is one of the step's."""

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
        """With the log-probabilities after the step."""
        values, advantages, before = self._kept
        return Explanation(values, advantages, before, after.tolist())
