"""When a run takes another rollout actor, when it lets one go, and who has the last word."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from cluster.actors.control import RunControl
from deploy.ring.autoscaling import IdleShareAutoscaler
from deploy.ring.calls import ElasticQueue


def wishes(policy: IdleShareAutoscaler, share: float, num_actors: int, num_steps: int) -> list[int]:
    return [policy.after_step(waited_s=share, step_s=1.0, num_actors=num_actors) for _ in range(num_steps)]


def test_an_actor_joins_after_five_steps_in_which_the_learner_idled() -> None:
    assert wishes(IdleShareAutoscaler(min_actors=1, max_actors=4), 0.3, 1, 5) == [1, 1, 1, 1, 2]


def test_one_long_wait_among_short_ones_counts_by_its_time() -> None:
    policy = IdleShareAutoscaler(min_actors=1, max_actors=4)
    wishes(policy, 0.0, 1, 4)
    assert policy.after_step(waited_s=6.0, step_s=7.0, num_actors=1) == 2


def test_none_is_added_to_actors_that_have_not_joined_yet_and_five_steps_are_counted_from_their_joining() -> None:
    policy = IdleShareAutoscaler(min_actors=1, max_actors=4)
    assert wishes(policy, 0.9, 1, 30)[4:] == [2] * 26
    assert wishes(policy, 0.9, 2, 5) == [2, 2, 2, 2, 3]


def test_an_actor_leaves_after_twenty_steps_in_which_the_learner_never_waited() -> None:
    policy = IdleShareAutoscaler(min_actors=1, max_actors=4)
    wishes(policy, 0.9, 1, 5)
    assert wishes(policy, 0.01, 2, 20) == [2] * 19 + [1]


def test_between_the_two_shares_nothing_changes() -> None:
    policy = IdleShareAutoscaler(min_actors=1, max_actors=4)
    wishes(policy, 0.9, 1, 5)
    assert set(wishes(policy, 0.1, 2, 200)) == {2}


def test_the_bounds_are_kept() -> None:
    policy = IdleShareAutoscaler(min_actors=2, max_actors=3)
    assert set(wishes(policy, 0.0, 2, 100)) == {2}
    wishes(policy, 0.9, 2, 5)
    assert set(wishes(policy, 0.9, 3, 100)) == {3}


def test_an_actor_that_had_to_come_back_stays_twice_as_long() -> None:
    policy = IdleShareAutoscaler(min_actors=1, max_actors=2)
    wishes(policy, 0.9, 1, 5)
    wishes(policy, 0.0, 2, 20)
    assert wishes(policy, 0.9, 1, 5)[-1] == 2
    assert wishes(policy, 0.0, 2, 40) == [2] * 39 + [1]


class Waits:
    """A queue whose groups come after so many seconds each, and the clock that tells; a step takes one more."""

    def __init__(self, waits_s: Iterable[float]) -> None:
        self._waits_s: Iterator[float] = iter(waits_s)
        self.now_s = 0.0

    async def take(self, step: int) -> list[list[Any]]:
        self.now_s += next(self._waits_s)
        return []


async def taken(control: RunControl, num_steps: int) -> tuple[list[str], int]:
    """The notes of that many steps whose learner idles half of its time, and the number of actors wanted then."""
    waits = Waits([100.0] + [1.0] * num_steps)
    notes: list[str] = []
    policy = IdleShareAutoscaler(min_actors=1, max_actors=2)
    queue = ElasticQueue(waits, policy, control, num_actors=lambda: 1, note=notes.append, clock=lambda: waits.now_s)
    for step in range(1, num_steps + 1):
        await queue.take(step)
        waits.now_s += 1.0
    return notes, await control.wait_num_rollout_actors(0)


async def test_the_wait_for_the_first_step_is_no_reason_and_five_more_are() -> None:
    assert await taken(RunControl(1), 5) == ([], 1)
    assert await taken(RunControl(1), 6) == (["step 6: the learner waited for groups; 2 rollout actors"], 2)


async def test_what_a_person_asked_for_stays() -> None:
    control = RunControl(1)
    await control.set_num_rollout_actors(3)
    assert await taken(control, 20) == ([], 3)
