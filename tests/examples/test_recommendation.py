"""The recommendation task: users, clicks, rankings and metrics."""

from __future__ import annotations

import random
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from examples.recommendation.data import (
    ITEMS,
    NUM_LIKED,
    NUM_OFFERED,
    WORLD,
    build_data,
    row,
    sample_visit,
    shop_list,
)
from examples.recommendation.metrics import evaluate
from examples.recommendation.model import build_model
from examples.recommendation.scorers import click_reward, ranked_items
from tests.support.chat_tasks import (
    require_built_from_the_seed_alone,
    require_small_model,
    require_tokens_keep_the_text,
    rows,
)

OFFERED = ["atlas", "chess", "dunes", "knots", "tides", "whales"]
CERTAIN = [1.0, 1.0, 1.0, 1.0, 1.0, 0.0]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recommendation")
    build_data(path, seed=0)
    return path


def reward(response: str, chances: list[float] = CERTAIN) -> float:
    return click_reward(["p"], [response], offered=[OFFERED], click_chances=[chances], popularity=[[0.0] * 6])[0]


@pytest.mark.parametrize(
    ("response", "least", "most"),
    [
        ("atlas, chess, dunes, knots, tides.", 1.0, 1.0),
        ("1. Atlas\n2. Chess\n3. Dunes\n4. Knots\n5. Tides\n", 1.0, 1.0),
        ("atlas, chess, dunes, knots, tides, whales.", 1.0, 1.0),
        ("atlas, atlas, atlas, atlas, atlas.", 0.3, 0.4),
        ("whales, atlas, chess, dunes, knots.", 0.6, 0.7),
        ("atlas", 0.3, 0.4),
        ("atlas chess dunes knots tides", 0.0, 0.0),
        ("unicorns, gold.", 0.0, 0.0),
        ("", 0.0, 0.0),
        (",,,,\x00💥", 0.0, 0.0),
    ],
)
def test_clicks_pay_by_place_once_each_and_only_for_what_is_on_offer(response: str, least: float, most: float) -> None:
    assert least <= reward(response) <= most


def test_a_list_breaks_off_where_it_repeats_or_makes_up_an_item() -> None:
    certain = [1.0] * 6
    whole = reward("atlas, chess, dunes, knots, tides.", certain)
    after_three = reward("atlas, chess, dunes.", certain)
    assert 0 < after_three < whole == 1
    for fault in ("atlas", "gold"):
        assert reward(f"atlas, chess, dunes, {fault}, knots.", certain) == after_three


def test_clicks_follow_from_chance_and_are_the_same_again() -> None:
    even = [0.5] * 6
    rankings = [", ".join(random.Random(seed).sample(OFFERED, 5)) for seed in range(400)]
    rewards = [reward(ranking, even) for ranking in rankings]
    assert rewards == [reward(ranking, even) for ranking in rankings]
    assert fmean(rewards) == pytest.approx(0.5, abs=0.05)
    assert len(set(rewards)) > 5


def test_items_are_parted_by_commas_lines_or_numbers() -> None:
    assert ranked_items("1) Atlas; chess,\n - Dunes.") == ["atlas", "chess", "dunes"]


def test_ndcg_is_1_for_the_best_order_and_is_measured_for_popularity() -> None:
    chances, popularity = [0.9, 0.8, 0.7, 0.6, 0.5, 0.4], [0, 1, 2, 3, 4, 5]
    responses = ["atlas, chess, dunes, knots, tides.", "whales, whales.", ""]
    given: dict[str, Any] = {"offered": [OFFERED] * 3, "click_chances": [chances] * 3}
    measured = evaluate(["p"] * 3, responses, **given, popularity=[popularity] * 3)
    assert measured["valid"] == pytest.approx(1 / 3)
    assert 1 / 3 < measured["ndcg_5"] < 0.5
    assert 0.7 < measured["ndcg_5_popularity"] < 0.9
    assert evaluate(["p"], responses[:1], offered=[OFFERED], click_chances=[chances]) == {"ndcg_5": 1.0, "valid": 1.0}


def test_order_by_liked_items_is_better_than_the_shops_and_by_popularity() -> None:
    choice = random.Random(0)
    history, shop, chance = list[str](), list[str](), list[str]()
    visits = [sample_visit(choice) for _ in range(1000)]
    for visit in visits:
        mean = [fmean(WORLD[item].factors[k] for item in visit.liked) for k in range(2)]
        worth = {i: sum(a * b for a, b in zip(mean, WORLD[i].factors, strict=True)) for i in visit.offered}
        history.append(", ".join(sorted(visit.offered, key=worth.__getitem__, reverse=True)))
        shop.append(shop_list(visit, choice))
        chance.append(", ".join(visit.offered))
    described = [row(visit) for visit in visits]
    columns = {name: [each[name] for each in described] for name in ("offered", "click_chances", "popularity")}
    by_history, by_shop, by_chance = (evaluate([], each, **columns)["ndcg_5"] for each in (history, shop, chance))
    popular = evaluate([], shop, **columns)["ndcg_5_popularity"]
    assert by_history > by_shop + 0.05 > popular + 0.1 > by_chance + 0.1


def test_a_prompt_tells_what_was_liked_and_what_is_on_offer(data: Path) -> None:
    for each in rows(data / "evaluation.parquet"):
        liked, offered = (
            part.split(": ")[1].strip(".").split(", ") for part in each["prompt"][0]["content"].split(". ")
        )
        assert (len(liked), len(offered), offered) == (NUM_LIKED, NUM_OFFERED, each["offered"])
        assert len({*liked, *offered} & set(ITEMS)) == NUM_LIKED + NUM_OFFERED


def test_data_follow_from_the_seed_and_held_out_users_are_not_trained_on(tmp_path: Path) -> None:
    require_built_from_the_seed_alone(build_data, tmp_path)


def test_text_survives_the_tokens_of_a_small_model(data: Path, tmp_path: Path) -> None:
    require_tokens_keep_the_text(build_model, data, tmp_path)
    require_small_model(tmp_path)
