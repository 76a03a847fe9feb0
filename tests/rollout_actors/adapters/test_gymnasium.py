"""Tests of the Gymnasium adapter with environments of Gymnasium."""

from __future__ import annotations

from typing import Any

import gymnasium
import pytest

from cluster.errors import InputError
from rollout_actors.adapters.gymnasium import GymnasiumText
from rollout_actors.config import EnvironmentConfig
from rollout_actors.environments.host import InProcessHost, Threads
from rollout_actors.environments.pool import try_out
from rollout_actors.environments.protocol import Step

PATH = "rollout_actors.adapters.gymnasium:GymnasiumText"
LAKE: dict[str, Any] = {"id": "FrozenLake-v1", "is_slippery": False, "actions": ["left", "down", "right", "up"]}


def shout(observation: int, environment: Any) -> str:
    return f"at {observation} of {environment.observation_space.n}"


def last_letter(response: str, environment: Any) -> int:
    if response[-1:] not in "ldru":
        raise ValueError("end with l, d, r or u")
    return "ldru".index(response[-1])


async def test_actions_are_parsed_from_words_and_numbers() -> None:
    host = InProcessHost(GymnasiumText(**LAKE, rules="cross the lake"), Threads(1), timeout_s=10)
    assert await host.reset(3, {}) == [{"role": "user", "content": "cross the lake\n0"}]
    steps = [await host.step(word) for word in ("down", "1", "go right.", "DOWN", "2", "right")]
    assert [step.observation for step in steps] == ["4", "8", "9", "13", "14", "15"]
    assert [step.reward for step in steps] == [0.0] * 5 + [1.0]
    assert [step.terminated for step in steps] == [False] * 5 + [True]
    assert steps[-1].info["final_reward"] == 1.0


async def test_a_response_that_is_not_an_action_gets_an_error() -> None:
    host = InProcessHost(GymnasiumText(**LAKE, malformed_reward=-0.1), Threads(1), timeout_s=10)
    await host.reset(0, {})
    assert await host.step("jump 7") == Step(
        "answer with one of: left, down, right, up", -0.1, False, False, {"malformed": 1.0}
    )
    assert (await host.step("down")).observation == "4"


async def test_tuple_observations_are_formatted_and_long_games_truncated() -> None:
    host = InProcessHost(GymnasiumText("Blackjack-v1", actions=["stick", "hit"]), Threads(1), timeout_s=10)
    start = await host.reset(1, {})
    assert isinstance(start, list)
    player, dealer, ace = start[0]["content"].split(", ")
    assert (4 <= int(player) <= 21, 1 <= int(dealer) <= 10, ace in ("0", "1", "True", "False")) == (True, True, True)
    taxi = InProcessHost(GymnasiumText("Taxi-v3", max_episode_steps=2), Threads(1), timeout_s=10)
    await taxi.reset(0, {})
    assert [(step.terminated, step.truncated) for step in [await taxi.step("0"), await taxi.step("1")]] == [
        (False, False),
        (False, True),
    ]


async def test_render_and_parse_of_the_user_are_used() -> None:
    here = __name__
    environment = GymnasiumText("FrozenLake-v1", render=f"{here}:shout", parse=f"{here}:last_letter", is_slippery=False)
    host = InProcessHost(environment, Threads(1), timeout_s=10)
    assert await host.reset(0, {}) == [{"role": "user", "content": "at 0 of 16"}]
    assert (await host.step("walk d")).observation == "at 4 of 16"
    assert (await host.step("walk")).observation == "end with l, d, r or u"


@pytest.mark.process
async def test_the_same_seed_gives_the_same_game() -> None:
    await try_out(EnvironmentConfig(path=PATH, settings={"id": "Blackjack-v1"}), {})
    await try_out(EnvironmentConfig(path=PATH, settings=LAKE, own_process=True), {})


def test_the_error_names_a_missing_id_render_or_parse() -> None:
    with pytest.raises(InputError, match=r"settings\.render: needed, because observations of Box"):
        GymnasiumText("CartPole-v1")
    with pytest.raises(InputError, match=r"settings\.parse: needed, because actions of Box"):
        GymnasiumText("Pendulum-v1", render=f"{__name__}:shout")
    with pytest.raises(InputError, match=r"settings\.id: gymnasium cannot make 'Nowhere-v0'"):
        GymnasiumText("Nowhere-v0")
    assert isinstance(gymnasium.spaces.Text(5).sample(), str)
