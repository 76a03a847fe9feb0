"""Test the order of prompts: tasks by weight, each with its own order, from seeds only."""

from __future__ import annotations

from collections import Counter
from itertools import islice

from hypothesis import given
from hypothesis import strategies as st

from cluster.data.prompt_order import MixedPrompts, PromptOrder, TaskPrompts, mixed

WEIGHTS = st.lists(st.floats(0.05, 20), min_size=1, max_size=6)


def tasks(*weights: float, num_rows: int = 5) -> list[TaskPrompts]:
    return [
        TaskPrompts(name, [{"prompt": f"{name}{i}"} for i in range(num_rows)], weight)
        for name, weight in zip("abcdef", weights, strict=False)
    ]


def asked(order: MixedPrompts, num: int) -> list[str]:
    return [order.prompt(number).row["prompt"] for number in range(num)]


@given(WEIGHTS, st.integers(1, 300))
def test_no_source_is_ever_a_whole_draw_ahead_of_its_share_nor_far_behind(weights: list[float], num: int) -> None:
    counts = Counter(islice(mixed(weights), num))
    for source, weight in enumerate(weights):
        share = num * weight / sum(weights)
        assert counts[source] < share + 1 + 1e-9
        assert counts[source] > share - len(weights)


def test_equal_weights_take_turns_and_a_double_one_comes_twice() -> None:
    assert list(islice(mixed([1, 1, 1]), 7)) == [0, 1, 2, 0, 1, 2, 0]
    assert list(islice(mixed([2, 1]), 6)) == [0, 1, 0, 0, 1, 0]


@given(WEIGHTS, st.integers(0, 9), st.lists(st.integers(0, 60), min_size=1, max_size=20))
def test_a_prompt_depends_only_on_seed_and_number(weights: list[float], seed: int, numbers: list[int]) -> None:
    in_order = MixedPrompts(tasks(*weights), seed)
    expected = [in_order.prompt(number) for number in range(61)]
    again = MixedPrompts(tasks(*weights), seed)
    assert [again.prompt(number) for number in numbers] == [expected[number] for number in numbers]


def test_each_task_shuffles_all_its_rows_anew_every_epoch() -> None:
    given_tasks = [TaskPrompts("few", [{"prompt": f"few{i}"} for i in range(5)]), *tasks(1.0, num_rows=10)]
    prompts = asked(MixedPrompts(given_tasks, 3), 40)
    few, many = ([prompt for prompt in prompts if prompt.startswith(name)] for name in ("few", "a"))
    epochs = [few[start : start + 5] for start in range(0, 20, 5)]
    assert all(len(set(epoch)) == 5 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert len(set(many[:10])) == len(set(many[10:])) == 10


def test_rows_that_are_not_shuffled_keep_their_order_in_every_epoch() -> None:
    rows = [{"prompt": str(number)} for number in range(5)]
    prompts = asked(MixedPrompts([TaskPrompts("few", rows, shuffle=False)], 3), 10)
    assert prompts == [*"0123401234"]


def test_tasks_have_different_orders() -> None:
    (alone,) = tasks(1.0, num_rows=30)
    order = PromptOrder(alone.rows, 7)
    assert asked(MixedPrompts([alone], 7), 60) == [order.row(number)["prompt"] for number in range(60)]
    prompts = asked(MixedPrompts(tasks(1.0, 1.0, num_rows=30), 7), 60)
    assert [prompt[1:] for prompt in prompts[::2]] != [prompt[1:] for prompt in prompts[1::2]]
    assert asked(MixedPrompts(tasks(1.0, 1.0, num_rows=30), 8), 60) != prompts
