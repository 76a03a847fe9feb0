"""TextArena games as environments: seats, opponents, outcomes, randomness and demonstrations."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import InputError
from deploy.config.load import load_run_config
from tests.support.chat_tasks import rows
from tests.support.paths import ROOT

pytest.importorskip("textarena", reason="the extra textarena is not installed")
from examples.text_arena.data import build_data
from examples.text_arena.game import TextArena, as_move, listed_move

GAME = "TicTacToe-v0"


def play(arena: TextArena, seed: int, policy: Any = listed_move) -> list[Any]:
    """Play a game with a random policy; return all that the policy saw and the result."""
    choice, seen = random.Random(seed), [arena.reset(seed=seed)[0]["content"]]
    while True:
        observation, *result = arena.step(policy(seen[-1], choice))
        seen.append(observation)
        if result[1] or result[2]:
            return [*seen, result]


@pytest.mark.parametrize("game", [GAME, "SimpleTak-v0", "KuhnPoker-v0"])
def test_a_game_ends_with_a_reward_and_replays_from_its_seed(game: str) -> None:
    arena = TextArena(game)
    first = [play(arena, seed) for seed in range(6)]
    assert [play(TextArena(game), seed) for seed in range(6)] == first
    for *_, (reward, terminated, truncated, parts) in first:
        assert (terminated, truncated) == (True, False)
        assert parts["won"] == (reward == 1)
        assert parts["legal"] == 1


def test_the_policy_has_both_seats_and_never_sees_its_own_moves() -> None:
    games = [play(TextArena(GAME), seed) for seed in range(10)]
    assert {game[0].splitlines()[0] for game in games} == {f"You are Player {seat} in Tic Tac Toe." for seat in (0, 1)}
    for seen in games:
        seat = int(seen[0][15])
        assert not any(f"Player {seat}: [" in text for text in seen[:-1])


def test_only_the_last_message_is_shown_after_the_first_turn_if_asked() -> None:
    seen = play(TextArena(GAME, show="last"), 1)
    assert all(text.startswith("Current Board:") for text in seen[1:-2])
    assert seen[0].startswith("You are Player")


def test_a_move_that_is_not_allowed_twice_loses() -> None:
    *_, (reward, terminated, _, parts) = play(TextArena(GAME), 1, policy=lambda seen, choice: "nowhere")
    assert (reward, terminated, parts["legal"]) == (0.0, True, 0.0)


def test_the_game_leaves_the_modules_randomness_alone() -> None:
    random.seed(5)
    expected = [random.random() for _ in range(3)]
    random.seed(5)
    arena = TextArena(GAME)
    found = [random.random()]
    seen = arena.reset(seed=1)[0]["content"]
    found.append(random.random())
    arena.step(listed_move(seen, random.Random(0)))
    assert [*found, random.random()] == expected


def test_moves_get_brackets() -> None:
    assert [as_move(text) for text in ("4", " [4] ", "I take [4]")] == ["[4]", " [4] ", "I take [4]"]


def test_error_if_a_game_is_unknown_or_lists_no_moves() -> None:
    with pytest.raises(InputError, match=r"environment\.settings\.game: TextArena cannot make 'Nope-v0'"):
        TextArena("Nope-v0")
    with pytest.raises(ValueError, match=r"set environment\.settings\.opponent to a function"):
        play(TextArena("Nim-v0"), 0, policy=lambda seen, choice: "[0 1]")


def test_an_opponent_of_ones_own_plays_a_game_that_lists_no_moves() -> None:
    arena = TextArena("Nim-v0", opponent="tests.support.scorers:take_one")
    *_, (_, terminated, _, _) = play(arena, 0, policy=take_one_of_the_rest)
    assert terminated


def take_one_of_the_rest(seen: str, choice: random.Random) -> str:
    from tests.support.scorers import take_one

    return take_one(seen, choice)


def test_demonstrations_end_with_a_move_that_the_game_lists(tmp_path: Path) -> None:
    build_data(tmp_path, seed=0, game=GAME, num_moves=20)
    for row in rows(tmp_path / "sft.parquet"):
        *before, move = row["messages"]
        assert move["role"] == "assistant"
        assert move["content"] in before[-1]["content"]


def test_the_run_file_is_valid() -> None:
    load_run_config(ROOT / "examples" / "text_arena" / "run.toml")
