"""The idle-share policy: when an actor is added and when one is removed."""

from __future__ import annotations

from deploy.ring.autoscaling import IdleShareAutoscaler


def wanted(policy: IdleShareAutoscaler, share: float, num_actors: int, num_steps: int) -> list[int]:
    return [policy.after_step(waited_s=share, step_s=1.0, num_actors=num_actors) for _ in range(num_steps)]


def test_an_actor_is_added_after_five_steps_with_an_idle_learner() -> None:
    assert wanted(IdleShareAutoscaler(min_actors=1, max_actors=4), 0.3, 1, 5) == [1, 1, 1, 1, 2]


def test_one_long_wait_counts_by_its_time() -> None:
    policy = IdleShareAutoscaler(min_actors=1, max_actors=4)
    wanted(policy, 0.0, 1, 4)
    assert policy.after_step(waited_s=6.0, step_s=7.0, num_actors=1) == 2


def test_no_actor_is_added_before_the_last_one_has_joined() -> None:
    policy = IdleShareAutoscaler(min_actors=1, max_actors=4)
    assert wanted(policy, 0.9, 1, 30)[4:] == [2] * 26
    assert wanted(policy, 0.9, 2, 5) == [2, 2, 2, 2, 3]


def test_an_actor_is_removed_after_twenty_steps_without_waiting() -> None:
    policy = IdleShareAutoscaler(min_actors=1, max_actors=4)
    wanted(policy, 0.9, 1, 5)
    assert wanted(policy, 0.01, 2, 20) == [2] * 19 + [1]


def test_nothing_changes_between_the_two_shares() -> None:
    policy = IdleShareAutoscaler(min_actors=1, max_actors=4)
    wanted(policy, 0.9, 1, 5)
    assert set(wanted(policy, 0.1, 2, 200)) == {2}


def test_the_number_stays_within_its_bounds() -> None:
    policy = IdleShareAutoscaler(min_actors=2, max_actors=3)
    assert set(wanted(policy, 0.0, 2, 100)) == {2}
    wanted(policy, 0.9, 2, 5)
    assert set(wanted(policy, 0.9, 3, 100)) == {3}


def test_an_actor_that_was_added_again_stays_twice_as_long() -> None:
    policy = IdleShareAutoscaler(min_actors=1, max_actors=2)
    wanted(policy, 0.9, 1, 5)
    wanted(policy, 0.0, 2, 20)
    assert wanted(policy, 0.9, 1, 5)[-1] == 2
    assert wanted(policy, 0.0, 2, 40) == [2] * 39 + [1]
