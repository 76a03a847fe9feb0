"""Chooses the number of rollout actors: as few as keep the learner from waiting.

Uses the learner's idle share: the part of a step's time during which it waited for groups. The actor pool starts and
stops the actors.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

from cluster.actors.remote import within

ADD_ABOVE, NUM_STEPS_BEFORE_ADDING = 0.2, 5
"""Add an actor if the idle share of this many steps, all with the same number of actors, is above this."""
REMOVE_BELOW, NUM_STEPS_BEFORE_REMOVING = 0.05, 20
"""Remove an actor if the idle share of this many steps is below this (the call itself takes some time). The number of
steps doubles each time a removed actor had to be added again."""
REQUEST_TIMEOUT_S = 30.0


class IdleShareAutoscaler:
    """Decides how many actors there should be from the idle share of the last steps."""

    def __init__(self, *, min_actors: int, max_actors: int) -> None:
        self._min_actors = min_actors
        self._max_actors = max_actors
        self._wanted = self._num_actors = min_actors
        self._num_before_removing = NUM_STEPS_BEFORE_REMOVING
        self._has_removed = False
        self._steps: list[tuple[float, float]] = []

    def after_step(self, *, waited_s: float, step_s: float, num_actors: int) -> int:
        """Return the wanted number of actors after a step of `step_s`, of which the learner waited `waited_s`.

        No actor is added while one that was requested before has not joined.
        """
        if num_actors != self._num_actors:
            self._num_actors = num_actors
            self._steps.clear()
        self._steps.append((waited_s, step_s))
        if self._has_too_few() and self._wanted < self._max_actors and num_actors >= self._wanted:
            if self._has_removed:
                self._num_before_removing *= 2
            self._want(num_actors + 1)
        elif self._has_too_many() and num_actors > self._min_actors:
            self._want(num_actors - 1)
        return self._wanted

    def _want(self, num_actors: int) -> None:
        self._has_removed = num_actors < self._num_actors
        self._wanted = num_actors
        self._steps.clear()

    def _has_too_few(self) -> bool:
        last = self._steps[-NUM_STEPS_BEFORE_ADDING:]
        return len(last) == NUM_STEPS_BEFORE_ADDING and _idle_share(last) > ADD_ABOVE

    def _has_too_many(self) -> bool:
        last = self._steps[-self._num_before_removing :]
        return len(last) == self._num_before_removing and _idle_share(last) < REMOVE_BELOW


def _idle_share(steps: Sequence[tuple[float, float]]) -> float:
    return sum(waited_s for waited_s, _ in steps) / sum(step_s for _, step_s in steps)


class AcceptsSuggestions(Protocol):
    """The run's control actor."""

    def suggest_num_rollout_actors(self, num: int) -> Awaitable[bool]:
        """Request a number of actors; returns False if a person has set one, which then stays."""


class Autoscaler:
    """Requests the number of actors that the policy decides after each step.

    The first step of a command is not counted: its wait includes the start of the actors.
    """

    def __init__(
        self,
        policy: IdleShareAutoscaler,
        control: AcceptsSuggestions,
        *,
        num_actors: Callable[[], int],
        note: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._policy = policy
        self._control = control
        self._num_actors = num_actors
        self._note = note
        self._clock = clock
        self._taken_at: float | None = None
        self._wanted = num_actors()

    async def after_take(self, step: int, waited_s: float) -> None:
        """Apply the policy once the groups of a step, for which the learner waited `waited_s`, are taken."""
        before, self._taken_at = self._taken_at, self._clock()
        if before is None:
            return
        step_s = self._taken_at - before
        wanted = self._policy.after_step(waited_s=waited_s, step_s=step_s, num_actors=self._num_actors())
        await self._request(step, wanted)

    async def _request(self, step: int, wanted: int) -> None:
        before, self._wanted = self._wanted, wanted
        if wanted == before:
            return
        accepted = await within(
            self._control.suggest_num_rollout_actors(wanted),
            REQUEST_TIMEOUT_S,
            where="run_control",
            waited_for="an answer to a request for another number of rollout actors",
        )
        if accepted:
            reason = "the learner waited for groups" if wanted > before else "the learner did not wait"
            self._note(f"step {step}: {reason}; {wanted} rollout actors")
