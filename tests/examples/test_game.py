"""Tic-tac-toe and FrozenLake: rules, opponents, demonstrations and the tiny model's vocabulary."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from examples.game import demonstrations, lake
from examples.game.model import build_model
from examples.game.tictactoe import EMPTY, TicTacToe, after, best_moves, free, shown, value, winner
from rollout_actors.adapters.gymnasium import GymnasiumText
from rollout_actors.config import EnvironmentConfig
from rollout_actors.environments.pool import try_out


def play(game: TicTacToe, seed: int, choose: object) -> tuple[float, dict[str, float]]:
    """Play one game with the policy `choose(board)`; return its reward and info."""
    game.reset(seed=seed)
    while True:
        _, reward, is_over, _, info = game.step(choose(game._board))  # type: ignore[operator]
        if is_over:
            return reward, info


def test_perfect_play_draws_and_never_loses() -> None:
    assert value(EMPTY, "x") == 0
    assert value("xx oo    ", "x") == 1
    assert value("xx oo    ", "o") == 1
    assert best_moves("xx oo    ", "x") == [2]
    choice = random.Random(0)
    games = [
        play(TicTacToe(), seed, lambda board: str(choice.choice(best_moves(board, "x")) + 1)) for seed in range(100)
    ]
    assert all(info["not_lost"] for _, info in games)
    assert {reward for reward, _ in games} == {0.5, 1.0}


def test_a_random_player_loses_more_to_a_better_opponent() -> None:
    def lost(share: float) -> float:
        choice = random.Random(1)
        game = TicTacToe(perfect_share=share)
        played = [play(game, seed, lambda board: str(choice.choice(free(board)) + 1)) for seed in range(200)]
        return sum(not info["not_lost"] for _, info in played) / 200

    assert lost(0.0) < lost(0.5) < lost(1.0)


@pytest.mark.parametrize("move", ["", "0", "10", "x", "1 2", "²"])
def test_a_response_that_is_no_move_loses_the_game(move: str) -> None:
    game = TicTacToe()
    game.reset(seed=1)
    assert game.step(move) == ("illegal", 0.0, True, False, {"not_lost": 0.0, "won": 0.0, "legal": 0.0})


def test_a_taken_square_loses_and_the_board_shows_free_squares() -> None:
    game = TicTacToe()
    game.reset(seed=1)
    board = game._board
    taken = [square for square in range(9) if square not in free(board)]
    assert shown(EMPTY) == "1 2 3 | 4 5 6 | 7 8 9"
    assert shown(after(after(EMPTY, 4, "o"), 8, "x")) == "1 2 3 | 4 o5 6 | 7 8 x9"
    for square in taken:
        assert game.step(str(square + 1))[0] == "illegal"
    assert winner("ooo      ") == "o"


def test_demonstrations_follow_from_the_seed_and_are_legal_moves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demonstrations, "NUM_GAMES", 50)
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        demonstrations.build_data(tmp_path / name, seed=seed)
    a, b, c = (pq.read_table(tmp_path / name / "sft.parquet")["messages"].to_pylist() for name in "abc")
    assert a == b != c
    for messages in a:
        assert messages[-1]["role"] == "assistant"
        assert messages[-1]["content"] in messages[-2]["content"].split()


def test_the_lake_is_drawn_and_some_walks_reach_the_goal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lake, "NUM_WALKS", 200)
    lake.build_data(tmp_path, seed=0)
    walks = pq.read_table(tmp_path / "sft.parquet")["messages"].to_pylist()
    assert walks[0][0]["content"] == "P F F F | F H F H | F F F H | H F F G"
    actions = Counter(messages[-1]["content"] for messages in walks)
    assert set(actions) == set(lake.ACTIONS)
    environment = GymnasiumText("FrozenLake-v1", actions=lake.ACTIONS, is_slippery=False)
    environment.reset(seed=0)
    rewards = [environment.step(step)[1] for step in lake.WAY.values()]
    assert rewards == [0.0] * 5 + [1.0]


async def test_the_games_follow_the_environment_protocol() -> None:
    await try_out(EnvironmentConfig(path="examples.game.tictactoe:TicTacToe"), {})


def test_the_model_has_every_word_of_boards_and_moves(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    build_model(tmp_path, seed=0)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    messages = [{"role": "user", "content": shown("x o      ")}, {"role": "assistant", "content": "5"}]
    ids = tokenizer(tokenizer.apply_chat_template(messages, tokenize=False), add_special_tokens=False)["input_ids"]
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids[-2:], skip_special_tokens=True) == "5"
    assert ids[-1] == tokenizer.eos_token_id
