"""Stored answers: written and read, summarized, compared."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cluster.errors import InputError
from deploy.evaluation.answers import (
    GREEDY,
    Answer,
    by_row,
    compare,
    in_common,
    mean_rewards,
    of_task,
    pass_rates,
    read,
    reward_interval,
    write,
)


def answers(*rewards: tuple[float, ...]) -> list[Answer]:
    """Return answers with these rewards: one tuple for each row, one reward for each sample."""
    return [
        Answer(row, sample, f"prompt {row}", f"{reward} of {sample}", reward, 0.5, {"goal": reward})
        for row, samples in enumerate(rewards)
        for sample, reward in enumerate(samples)
    ]


def test_answers_are_read_as_they_were_written(tmp_path: Path) -> None:
    kept = [*answers((1.0, 0.0), (0.5, 0.25)), Answer(0, GREEDY, "prompt 0", "likeliest", 1.0)]
    write(tmp_path / "evaluation" / "after.parquet", kept)
    assert read(tmp_path / "evaluation" / "after.parquet") == kept
    assert not list(tmp_path.rglob("*.partial"))
    with pytest.raises(InputError, match="has no stored answers"):
        read(tmp_path / "evaluation" / "before.parquet")
    (tmp_path / "other.parquet").write_text("no")
    with pytest.raises(InputError, match="has no stored answers"):
        read(tmp_path / "other.parquet")


def test_greedy_answers_do_not_count_in_the_mean_reward() -> None:
    drawn = answers((1.0, 0.0), (0.5, 0.5))
    with_greedy = [*drawn, Answer(0, GREEDY, "prompt 0", "likeliest", 9.0)]
    assert mean_rewards(with_greedy) == [0.5, 0.5]
    assert reward_interval(with_greedy) == (0.5, 0.5, 0.5)
    assert {row: len(group) for row, group in by_row(with_greedy).items()} == {("", 0): 2, ("", 1): 2}


def test_pass_at_k_is_reported_for_powers_of_two_and_all_samples() -> None:
    drawn = answers((1.0, 0.0, 0.0), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    found = pass_rates(drawn, 1.0)
    assert list(found) == ["pass_at_1", "pass_at_2", "pass_at_3"]
    assert found["pass_at_1"] == pytest.approx(4 / 9)
    assert found["pass_at_2"] == pytest.approx((2 / 3 + 0 + 1) / 3)
    assert found["pass_at_3"] == pytest.approx(2 / 3)


def test_compare_lists_the_worst_changes_first() -> None:
    before, after = answers((0.5,), (1.0,), (1.0,), (0.0,)), answers((1.0,), (0.9,), (0.0,), (1.0,))
    difference, worse = compare(after, before, "there")
    assert difference.mean == pytest.approx((0.5 - 0.1 - 1.0 + 1.0) / 4)
    assert [(one.prompt, one.reward_before, one.reward_after) for one in worse] == [
        ("prompt 2", 1.0, 0.0),
        ("prompt 1", 1.0, 0.9),
    ]


def test_compare_fails_if_the_prompts_differ() -> None:
    before = answers((0.5,), (1.0,))
    other = [replace(before[0], prompt="another"), before[1]]
    with pytest.raises(InputError, match="there: has answers to other prompts: only 1 of 2 and 2 are the same"):
        compare(other, before, "there")
    with pytest.raises(InputError, match="there: has answers to other prompts"):
        compare(before[:1], before, "there")


def test_one_task_of_several_is_compared_like_a_single_task_run(tmp_path: Path) -> None:
    sums, games = answers((0.5,), (1.0,)), answers((3.0,), (2.0,))
    mixed = [replace(a, task=task) for task, own in (("sums", sums), ("games", games)) for a in own]
    write(tmp_path / "after.parquet", mixed)
    assert read(tmp_path / "after.parquet") == mixed
    assert list(by_row(mixed)) == [("games", 0), ("games", 1), ("sums", 0), ("sums", 1)]
    assert of_task(mixed, "sums") == sums
    assert compare(mixed, mixed, "there")[0].mean == 0.0
    difference, worse = compare(of_task(mixed, "games"), sums, "there")
    assert (difference.mean, worse) == (1.75, [])
    assert of_task(mixed, "chess") == []


def test_prompts_that_both_answered_are_paired_by_their_texts() -> None:
    after, before = answers((1.0,), (0.5,), (0.25,)), answers((0.0,), (0.125,), (9.0,))
    before = [replace(a, prompt=prompt) for a, prompt in zip(before, ("prompt 2", "prompt 0", "other"), strict=True)]
    new, old, nums = in_common(after, before, "there")
    assert ([a.reward for a in new], [a.reward for a in old], nums) == ([1.0, 0.25], [0.125, 0.0], (3, 3))
    assert compare(new, old, "there")[0].mean == pytest.approx((0.875 + 0.25) / 2)
    with pytest.raises(InputError, match="there: has answers to none of the same prompts"):
        in_common(after, [replace(before[2])], "there")


def test_a_prompt_that_comes_twice_is_paired_as_often_as_both_have_it() -> None:
    twice = [replace(a, prompt="same") for a in answers((1.0, 0.0), (0.5, 0.5), (0.0, 0.0))]
    once = [replace(a, prompt="same") for a in answers((0.0,))]
    new, old, _ = in_common(twice, once, "there")
    assert ([a.reward for a in new], [a.reward for a in old]) == ([1.0, 0.0], [0.0])


def test_the_last_user_message_is_shown_and_kept(tmp_path: Path) -> None:
    (plain,) = answers((1.0,))
    asked = replace(plain, row=1, question="how many?")
    write(tmp_path / "after.parquet", [plain, asked])
    assert [a.shown_prompt for a in read(tmp_path / "after.parquet")] == ["prompt 0", "how many?"]
