"""Tests of the verifiers adapter with environments of the package."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.errors import InputError
from rollout_actors.adapters.verifiers import VerifiersText
from rollout_actors.config import EnvironmentConfig
from rollout_actors.environments.host import InProcessHost, Threads
from rollout_actors.environments.pool import try_out

pytest.importorskip("verifiers", reason="the extra verifiers is not installed (it conflicts with vLLM)")

WORDS = ("north", "south", "east")


def dataset() -> Any:
    from datasets import Dataset

    return Dataset.from_dict({"question": [f"say {word}" for word in WORDS], "answer": list(WORDS)})


def exact(completion: list[Any], answer: str) -> float:
    return float(completion[-1].content == answer)


def length(completion: list[Any]) -> float:
    return float(sum(len(message.content) for message in completion if message.role == "assistant"))


def one_turn(system_prompt: str | None = None) -> Any:
    import verifiers as vf

    rubric = vf.Rubric(funcs=[exact, length], weights=[2.0, 0.0])
    return vf.SingleTurnEnv(dataset=dataset(), system_prompt=system_prompt, rubric=rubric)


def hints(max_turns: int = 4) -> Any:
    """Make an environment that ends with the right answer and answers others with its first letters."""
    import verifiers as vf

    class Hints(vf.MultiTurnEnv):  # type: ignore[misc]
        async def setup_state(self, state: Any) -> None:
            state["num_hints"] = 0

        async def env_response(self, messages: Any, state: Any, **_: Any) -> Any:
            if messages[-1].content == state["answer"]:
                state["final_env_response"] = [{"role": "user", "content": "yes"}]
                return state["final_env_response"]
            state["num_hints"] += 1
            return [{"role": "user", "content": f"it begins with {state['answer'][: state['num_hints']]}"}]

    def answered(state: Any) -> float:
        return float(any(turn["completion"][-1].content == state["answer"] for turn in state["trajectory"]))

    return Hints(dataset=dataset(), max_turns=max_turns, rubric=vf.Rubric(funcs=[answered]))


def by_groups() -> Any:
    import verifiers as vf

    def best(completions: list[Any]) -> list[float]:
        return [0.0 for _ in completions]

    return vf.SingleTurnEnv(dataset=dataset(), rubric=vf.Rubric(funcs=[best]))


def hosted(name: str, **settings: Any) -> InProcessHost:
    return InProcessHost(VerifiersText(f"{__name__}:{name}", **settings), Threads(1), timeout_s=30)


async def test_a_single_turn_ends_with_the_rubrics_reward_and_metrics() -> None:
    host = hosted("one_turn", system_prompt="be brief")
    start = await host.reset(4, {})
    assert start == [{"role": "system", "content": "be brief"}, {"role": "user", "content": "say south"}]
    step = await host.step("south")
    assert (step.observation, step.reward, step.terminated, step.truncated) == ([], 2.0, True, False)
    assert (step.info["exact"], step.info["length"], step.info["num_turns"]) == (1.0, 5.0, 1.0)
    await host.reset(0, {"row": 2})
    assert (await host.step("west")).reward == 0.0


async def test_turns_are_answered_until_the_environment_ends() -> None:
    host = hosted("hints")
    await host.reset(0, {})
    steps = [await host.step(word) for word in ("up", "nay", "north")]
    assert [step.observation for step in steps] == [
        [{"role": "user", "content": "it begins with n"}],
        [{"role": "user", "content": "it begins with no"}],
        [{"role": "user", "content": "yes"}],
    ]
    assert [(step.reward, step.terminated) for step in steps] == [(0.0, False), (0.0, False), (1.0, True)]
    assert steps[-1].info["answered"] == 1.0


async def test_max_turns_truncates_and_the_next_conversation_starts_fresh() -> None:
    host = hosted("hints", max_turns=2)
    await host.reset(0, {})
    await host.step("up")
    step = await host.step("down")
    assert (step.observation, step.reward, step.terminated, step.truncated) == ([], 0.0, False, True)
    assert await host.reset(1, {}) == [{"role": "user", "content": "say south"}]
    assert (await host.step("up")).observation == [{"role": "user", "content": "it begins with s"}]


async def test_the_same_seed_selects_the_same_row() -> None:
    settings = {"load": f"{__name__}:hints"}
    await try_out(EnvironmentConfig(path="rollout_actors.adapters.verifiers:VerifiersText", settings=settings), {})


def test_the_error_names_an_unsupported_environment() -> None:
    with pytest.raises(InputError, match=r"settings\.load: the rubric of .*by_groups scores groups"):
        VerifiersText(f"{__name__}:by_groups")
    with pytest.raises(InputError, match=r"settings\.load: .*dataset does not return a multi-turn environment"):
        VerifiersText(f"{__name__}:dataset")
