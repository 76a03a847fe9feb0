"""How many rollout actors a run has, where it may choose: as many as keep the learner from waiting, and no more.

Follows the learner's idle share, the part of a step's time that it waited for groups. Knows neither Ray nor how an
actor starts: it says a number, and supervision makes it so.
"""

from __future__ import annotations

from collections.abc import Awaitable, Sequence
from typing import Protocol

ADD_ABOVE, NUM_STEPS_BEFORE_ADDING = 0.2, 5
"""An actor joins where the learner idled more than this share of so many steps, all of them with the same actors."""
REMOVE_BELOW, NUM_STEPS_BEFORE_REMOVING = 0.05, 20
"""One leaves where it idled less than this share, which the call itself takes, of so many steps; of twice as many each
time that one had to come back."""
WISH_TIMEOUT_S = 30.0


class IdleShareAutoscaler:
    """The decision: how many actors there should be, from the steps that were done with those there are."""

    def __init__(self, *, min_actors: int, max_actors: int) -> None:
        self._min_actors = min_actors
        self._max_actors = max_actors
        self._wanted = self._num_actors = min_actors
        self._num_before_removing = NUM_STEPS_BEFORE_REMOVING
        self._has_removed = False
        self._steps: list[tuple[float, float]] = []

    def after_step(self, *, waited_s: float, step_s: float, num_actors: int) -> int:
        """How many there should be after a step of `step_s`, of which the learner waited `waited_s` for groups.

        While actors that were wished for have not joined, none is added to them.
        """
        if num_actors != self._num_actors:
            self._num_actors = num_actors
            self._steps.clear()
        self._steps.append((waited_s, step_s))
        if self._is_short() and self._wanted < self._max_actors and num_actors >= self._wanted:
            if self._has_removed:
                self._num_before_removing *= 2
            self._wish(num_actors + 1)
        elif self._is_plenty() and num_actors > self._min_actors:
            self._wish(num_actors - 1)
        return self._wanted

    def _wish(self, num_actors: int) -> None:
        self._has_removed = num_actors < self._num_actors
        self._wanted = num_actors
        self._steps.clear()

    def _is_short(self) -> bool:
        last = self._steps[-NUM_STEPS_BEFORE_ADDING:]
        return len(last) == NUM_STEPS_BEFORE_ADDING and _idle_share(last) > ADD_ABOVE

    def _is_plenty(self) -> bool:
        last = self._steps[-self._num_before_removing :]
        return len(last) == self._num_before_removing and _idle_share(last) < REMOVE_BELOW


def _idle_share(steps: Sequence[tuple[float, float]]) -> float:
    return sum(waited_s for waited_s, _ in steps) / sum(step_s for _, step_s in steps)


class TakesWishes(Protocol):
    """The run's control, as the policy sees it."""

    def suggest_num_rollout_actors(self, num: int) -> Awaitable[bool]:
        """Have another number of actors unless a person has said one; whether it was taken."""
