"""Selection of the next pair: least sure first, some at random, none twice, a few for a second annotator."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from reward_service.feedback.schemas import CandidatePair, Preference, ShownPair
from reward_service.feedback.selection import FeedbackSettings
from reward_service.feedback.store import FeedbackStore

SURE = FeedbackSettings(random_share=0, annotators_per_pair=1)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[FeedbackStore]:
    opened = FeedbackStore(tmp_path / "feedback.sqlite")
    yield opened
    opened.close()


def pair(
    id: str, gap: float | None = None, uncertainty: float | None = None, version: str | None = None
) -> CandidatePair:
    rewards: dict[str, Any] = {} if gap is None else {"first_reward": 1.0, "second_reward": 1.0 + gap}
    texts: dict[str, Any] = {"prompt": "p", "first": "a", "second": "b"}
    return CandidatePair(id=id, **texts, **rewards, uncertainty=uncertainty, policy_version=version)


async def label(store: FeedbackStore, annotator: str, shown: ShownPair, choice: str = "first") -> str:
    id = f"{annotator}-{shown.id}-{choice}"
    texts = {"prompt": shown.prompt, "first": shown.first, "second": shown.second}
    await store.add(
        Preference.model_validate(
            {"kind": "preference", "id": id, "annotator": annotator, "pair": shown.id, "choice": choice, **texts}
        )
    )
    return id


async def asked(
    store: FeedbackStore, annotator: str, settings: FeedbackSettings = SURE, choice: str = "first"
) -> list[str]:
    """Return the pairs that the annotator is asked about until none is left; labels each."""
    ids = []
    while (shown := (await store.next_pair(annotator, settings)).pair) is not None:
        ids.append(shown.id)
        await label(store, annotator, shown, choice)
    return ids


async def test_pairs_without_rewards_then_with_nearest_rewards_come_first(store: FeedbackStore) -> None:
    await store.add_pairs([pair("far", 3.0), pair("near", -0.1), pair("middle", 1.0), pair("unknown")])
    assert await asked(store, "Ann") == ["unknown", "near", "middle", "far"]


async def test_disagreement_of_an_ensemble_precedes_near_rewards(store: FeedbackStore) -> None:
    await store.add_pairs([pair("near", 0.0), pair("agreed", 0.0, 0.1), pair("divided", 5.0, 2.0)])
    assert await asked(store, "Ann") == ["divided", "agreed", "near"]


async def test_newer_opinion_changes_the_order_of_pairs(store: FeedbackStore) -> None:
    await store.add_pairs([pair("x", 0.1), pair("y", 0.5)])
    await store.add_pairs([pair("x", 9.0), pair("y")])
    assert await asked(store, "Ann") == ["y", "x"]


async def test_no_pair_is_asked_twice_unless_it_was_undone(store: FeedbackStore) -> None:
    await store.add_pairs([pair(f"p{i}") for i in range(5)])
    assert sorted(await asked(store, "Ann", choice="skip")) == [f"p{i}" for i in range(5)]
    await store.retract("Ann-p3-skip", annotator="Ann")
    answer = await store.next_pair("Ann", SURE)
    assert answer.pair is not None
    assert (answer.pair.id, answer.progress.num_done, answer.progress.num_left) == ("p3", 4, 1)


async def test_skipped_pair_is_asked_of_others_but_a_tie_is_not(store: FeedbackStore) -> None:
    await store.add_pairs([pair("skipped", 0.0), pair("tied", 1.0)])
    for choice in ("skip", "tie"):
        shown = (await store.next_pair("Ann", SURE)).pair
        assert shown
        await label(store, "Ann", shown, choice)
    assert await asked(store, "Bob") == ["skipped"]


async def test_pairs_with_labels_in_transit_are_left_out(store: FeedbackStore) -> None:
    await store.add_pairs([pair("x", 0.0), pair("y", 1.0)])
    answer = await store.next_pair("Ann", SURE, excepted=["x"])
    assert answer.pair is not None
    assert (answer.pair.id, answer.progress.num_left) == ("y", 2)
    assert (await store.next_pair("Ann", SURE, excepted=["x", "y"])).pair is None


async def test_concurrent_annotators_get_different_pairs_while_possible(
    store: FeedbackStore,
) -> None:
    await store.add_pairs([pair("x", 0.0), pair("y", 1.0)])
    shown = [(await store.next_pair(name, SURE)).pair for name in ("Ann", "Bob", "Cyd")]
    assert [one.id for one in shown if one] == ["x", "y", "x"]


async def test_share_of_pairs_is_asked_of_a_second_annotator(store: FeedbackStore) -> None:
    settings = FeedbackSettings(random_share=0, annotators_per_pair=1.3)
    await store.add_pairs([pair(f"p{i}") for i in range(200)])
    by_annotator = {name: await asked(store, name, settings) for name in ("Ann", "Bob", "Cyd")}
    assert len(by_annotator["Ann"]) == 200
    assert 40 <= len(by_annotator["Bob"]) <= 80
    assert by_annotator["Cyd"] == []
    assert sum(found.num_pairs for found in (await store.summary()).agreement) == len(by_annotator["Bob"])


async def test_question_depends_on_seed_annotator_and_count(tmp_path: Path) -> None:
    orders = []
    for i, seed in enumerate((0, 0, 1)):
        store = FeedbackStore(tmp_path / f"{i}.sqlite")
        await store.add_pairs([pair(f"p{n}", float(n)) for n in range(40)])
        orders.append(await asked(store, "Ann", FeedbackSettings(seed=seed, random_share=0.5)))
        store.close()
    assert orders[0] == orders[1] != orders[2]
    by_rank = [f"p{n}" for n in range(40)]
    assert sorted(orders[0], key=by_rank.index) == by_rank
    in_order = sum(id == min(orders[0][n:], key=by_rank.index) for n, id in enumerate(orders[0]))
    assert 12 <= in_order <= 36


async def test_half_of_the_annotators_see_the_second_response_first(store: FeedbackStore) -> None:
    await store.add_pairs([pair("x")])
    firsts = []
    for i in range(40):
        shown = (await store.next_pair(f"A{i}", SURE)).pair
        assert shown
        assert {shown.first, shown.second} == {"a", "b"}
        assert shown == (await store.next_pair(f"A{i}", SURE)).pair
        firsts.append(shown.first)
    assert 8 <= firsts.count("b") <= 32


async def test_only_pairs_of_the_policy_are_asked_if_one_is_set(store: FeedbackStore) -> None:
    await store.add_pairs([pair("old", version="1"), pair("new", version="2")])
    assert await asked(store, "Ann", SURE.model_copy(update={"policy_version": "2"})) == ["new"]
    progress = (await store.next_pair("Ann", SURE.model_copy(update={"policy_version": "2"}))).progress
    assert (progress.num_done, progress.num_left) == (1, 0)
