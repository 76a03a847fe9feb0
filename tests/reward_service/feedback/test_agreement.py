from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reward_service.feedback.agreement import Agreement, agreements, cohens_kappa, mean_agreement, raw_agreement

LABELS = st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("abc")), min_size=1, max_size=30)


def slow_kappa(first: list[str], second: list[str]) -> float | None:
    """Compute kappa by enumeration: matches of labels of the same item, and of any two items."""
    same_item = sum(first[i] == second[i] for i in range(len(first))) / len(first)
    any_items = sum(a == b for a in first for b in second) / len(first) ** 2
    return None if any_items == 1 else (same_item - any_items) / (1 - any_items)


@given(LABELS)
def test_kappa_equals_a_slow_reference(both: list[tuple[str, str]]) -> None:
    first, second = [a for a, _ in both], [b for _, b in both]
    kappa, slow = cohens_kappa(first, second), slow_kappa(first, second)
    assert kappa == (None if slow is None else pytest.approx(slow, abs=1e-12))
    assert cohens_kappa(second, first) == kappa


@pytest.mark.parametrize(
    ("counts", "raw", "kappa"),
    [
        ({("y", "y"): 20, ("y", "n"): 5, ("n", "y"): 10, ("n", "n"): 15}, 0.7, 0.4),
        ({("y", "y"): 45, ("y", "n"): 15, ("n", "y"): 25, ("n", "n"): 15}, 0.6, 0.1304),
        ({("y", "y"): 25, ("y", "n"): 35, ("n", "y"): 5, ("n", "n"): 35}, 0.6, 0.2593),
        ({("y", "y"): 3, ("n", "n"): 4}, 1.0, 1.0),
        ({("y", "n"): 1, ("n", "y"): 1}, 0.0, -1.0),
        ({("y", "y"): 5}, 1.0, None),
    ],
)
def test_known_tables_have_their_known_kappa(
    counts: dict[tuple[str, str], int], raw: float, kappa: float | None
) -> None:
    both = [labels for labels, count in counts.items() for _ in range(count)]
    first, second = [a for a, _ in both], [b for _, b in both]
    assert raw_agreement(first, second) == pytest.approx(raw)
    assert cohens_kappa(first, second) == (None if kappa is None else pytest.approx(kappa, abs=5e-5))


def test_only_items_that_both_labelled_count() -> None:
    labels = [("B", "1", "x"), ("A", "1", "x"), ("A", "2", "y"), ("B", "2", "x"), ("A", "3", "y"), ("C", "2", "y")]
    assert agreements(labels) == [
        Agreement(("A", "B"), 2, 0.5, 0.0),
        Agreement(("A", "C"), 1, 1.0, None),
        Agreement(("B", "C"), 1, 0.0, 0.0),
    ]


def test_mean_leaves_out_undefined_kappas() -> None:
    found = [Agreement(("A", "B"), 2, 0.5, 0.25), Agreement(("A", "C"), 9, 1.0, None)]
    assert mean_agreement(found) == (0.75, 0.25)
    assert mean_agreement(found[1:]) == (1.0, None)
