"""Functions in the signatures of TRL, OpenRLHF, verl and Antiphon."""

from __future__ import annotations

import re
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
import torch

from cluster.errors import NotApplicable, RewardError
from cluster.scoring import Score, ScoreRequest
from reward_service.functions.signatures import signature_kind
from tests.support.functions import InProcessScorer

ITEMS = [
    ScoreRequest("i0", "say a: ", "a", {"references": "a", "topic": "tea"}),
    ScoreRequest("i1", "say b: ", "bb", {"references": "b"}),
]


def ours(prompts: list[str], responses: list[str], **columns: Any) -> list[float]:
    return [float(len(response)) for response in responses]


def ours_by_other_names(questions: list[str], answers: list[str], topic: list[str | None]) -> list[float]:
    return [float(value is not None) for value in topic]


def trl(prompts: list[str], completions: list[str], topic: list[str | None], **columns: Any) -> list[float | None]:
    return [len(text) if name else None for text, name in zip(completions, topic, strict=True)]


def trl_completions_alone(completions: list[str], references: list[str]) -> list[float]:
    return [float(text == reference) for text, reference in zip(completions, references, strict=True)]


async def trl_async(completions: list[str], **columns: Any) -> list[float]:
    return [float(len(completion)) for completion in completions]


def openrlhf(queries: list[str], prompts: list[str], labels: list[str], **columns: Any) -> Any:
    assert all(query.startswith(prompt) for query, prompt in zip(queries, prompts, strict=True))
    return torch.tensor([float(query.endswith(label)) for query, label in zip(queries, labels, strict=True)])


def openrlhf_logs(queries: list[str], prompts: list[str], labels: list[str]) -> Any:
    rewards = torch.tensor([1.0, 2.0])
    logs = {"short": torch.tensor([0.1, 0.2]), "words": ["x", "y"], "one": 3.0, "bad": [float("nan"), 1.0]}
    return {"rewards": rewards, "scores": rewards / 2, "extra_logs": logs}


def verl(data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None) -> Any:
    if solution_str == "bb":
        raise ValueError("no such answer")
    return {"score": float(solution_str == ground_truth), "length": len(solution_str), "text": "x", "inf": np.inf}


async def verl_async(data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None) -> float:
    return float(len(solution_str))


@pytest.mark.parametrize(
    ("function", "kind"),
    [
        (ours, "ours"),
        (ours_by_other_names, "ours"),
        (trl, "trl"),
        (trl_completions_alone, "trl"),
        (openrlhf, "openrlhf"),
        (verl, "verl"),
        (verl_async, "verl"),
    ],
)
def test_signature_is_recognized_by_parameter_names(function: Callable[..., Any], kind: str) -> None:
    assert signature_kind(function) == kind


@pytest.mark.parametrize(
    ("function", "rewards"),
    [
        (ours, [1.0, 2.0]),
        (ours_by_other_names, [1.0, 0.0]),
        (trl_completions_alone, [1.0, 0.0]),
        (trl_async, [1.0, 2.0]),
        (openrlhf, [1.0, 1.0]),
        (openrlhf_logs, [1.0, 2.0]),
        (verl_async, [1.0, 2.0]),
    ],
)
async def test_each_signature_scores(function: Callable[..., Any], rewards: list[float]) -> None:
    outcomes = await InProcessScorer("s", function).score(ITEMS)
    assert [outcome.reward for outcome in outcomes if isinstance(outcome, Score)] == rewards


async def test_none_means_not_applicable_from_a_trl_function() -> None:
    good, none = await InProcessScorer("s", trl).score(ITEMS)
    assert isinstance(good, Score)
    assert isinstance(none, NotApplicable)
    assert str(none) == "s: does not apply to i1 (it returned None)"


async def test_none_is_an_error_from_any_other_function() -> None:
    (outcome,) = await InProcessScorer("s", lambda prompts, responses: [None]).score(ITEMS[:1])
    assert isinstance(outcome, RewardError)
    assert not isinstance(outcome, NotApplicable)


async def test_logs_of_an_openrlhf_function_become_parts_if_finite() -> None:
    first, second = await InProcessScorer("s", openrlhf_logs).score(ITEMS)
    assert isinstance(first, Score)
    assert isinstance(second, Score)
    assert dict(first.parts) == {"s": 1.0, "scores": 0.5, "short": pytest.approx(0.1), "one": 3.0}
    assert dict(second.parts) == {"s": 2.0, "scores": 1.0, "short": pytest.approx(0.2), "one": 3.0, "bad": 1.0}


async def test_verl_function_fails_only_the_item_that_it_raises_for() -> None:
    good, bad = await InProcessScorer("s", verl).score(ITEMS)
    assert isinstance(good, Score)
    assert dict(good.parts) == {"s": 1.0, "length": 1.0}
    assert re.fullmatch(
        r"s: raised ValueError: no such answer at tests/\S+test_signatures.py:\d+ \(scoring i1\)", str(bad)
    )


async def test_error_names_the_item_if_a_verl_function_lacks_ground_truth() -> None:
    (outcome,) = await InProcessScorer("s", verl).score([ScoreRequest("i9", "p", "a")])
    assert isinstance(outcome, RewardError)
    assert "needs a ground truth" in outcome.what
    assert "i9" in outcome.what


async def test_ground_truth_and_labels_columns_precede_references() -> None:
    item = ScoreRequest("i", "p", "a", {"references": "b", "ground_truth": "a", "labels": "a"})
    for function in (verl, openrlhf):
        (outcome,) = await InProcessScorer("s", function).score([item])
        assert isinstance(outcome, Score)
        assert outcome.reward == 1.0


@pytest.mark.parametrize(
    ("returned", "what"),
    [
        ({"scores": [1.0]}, "without rewards"),
        ({"rewards": [1.0]}, "returned 1 rewards for 2 responses"),
        (torch.tensor(1.0), "returned float, not a list"),
        (np.array([1.0]), "returned 1 rewards for 2 responses"),
    ],
)
async def test_every_item_fails_if_the_value_is_not_a_list_of_rewards(returned: Any, what: str) -> None:
    def reward_func(queries: list[str], prompts: list[str], labels: list[str]) -> Any:
        return returned

    outcomes = await InProcessScorer("s", reward_func).score(ITEMS)
    assert all(isinstance(outcome, RewardError) and what in outcome.what for outcome in outcomes)


@pytest.mark.parametrize("wrong", [{"reward": 1.0}, {"score": None}, "1", float("nan")])
async def test_error_if_a_verl_function_returns_no_finite_score(wrong: Any) -> None:
    def compute_score(data_source: str, solution_str: str, ground_truth: str) -> Any:
        return wrong

    (outcome,) = await InProcessScorer("s", compute_score).score(ITEMS[:1])
    assert isinstance(outcome, RewardError)
    assert "i0" in outcome.what


async def test_verl_function_gets_the_columns_of_verl() -> None:
    seen = []

    def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None) -> Any:
        seen.append((data_source, solution_str, ground_truth, extra_info))
        return {"score": np.float32(0.5), "acc": True, "count": Decimal("2.5"), "pred": "72"}

    columns = {
        "data_source": "openai/gsm8k",
        "reward_model": {"style": "rule", "ground_truth": "72"},
        "extra_info": {"split": "train", "index": 3},
    }
    (outcome,) = await InProcessScorer("s", compute_score).score([ScoreRequest("i", "p", "#### 72", columns)])
    assert isinstance(outcome, Score)
    assert outcome.reward == 0.5
    assert dict(outcome.parts) == {"s": 0.5, "acc": 1.0, "count": 2.5}
    own: dict[str, Any] = {"num_turns": None, "rollout_reward_scores": {}}
    assert seen == [("openai/gsm8k", "#### 72", "72", {"split": "train", "index": 3} | own)]


async def test_verl_function_may_return_its_score_first_in_a_tuple() -> None:
    def compute_score(data_source: str, solution_str: str, ground_truth: str) -> Any:
        return 1.0, "details"

    (outcome,) = await InProcessScorer("s", compute_score).score(ITEMS[:1])
    assert isinstance(outcome, Score)
    assert outcome.reward == 1.0


MESSAGES_ITEMS = [
    ScoreRequest(
        "c0", "<|user|>hi", "hello", {"messages": [{"role": "user", "content": "hi"}], "completion_ids": [1, 2]}
    ),
    ScoreRequest("c1", "<|user|>yo", "yes", {"messages": [{"role": "user", "content": "yo"}], "completion_ids": [3]}),
]


async def test_trl_function_gets_messages_if_the_prompts_are_messages() -> None:
    def reward(prompts: Any, completions: Any, **kwargs: Any) -> list[float]:
        assert [prompt[-1]["content"] for prompt in prompts] == ["hi", "yo"]
        assert all(completion[0]["role"] == "assistant" for completion in completions)
        assert kwargs["trainer_state"] is None  # not in a run
        return [float(len(completion[0]["content"])) for completion in completions]

    outcomes = await InProcessScorer("s", reward).score(MESSAGES_ITEMS)
    assert [outcome.reward for outcome in outcomes if isinstance(outcome, Score)] == [5.0, 3.0]


async def test_trl_function_of_completion_ids_gets_them() -> None:
    def reward(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        return [-float(len(ids)) for ids in completion_ids]

    assert signature_kind(reward) == "trl"
    outcomes = await InProcessScorer("s", reward).score(MESSAGES_ITEMS)
    assert [outcome.reward for outcome in outcomes if isinstance(outcome, Score)] == [-2.0, -1.0]
    (missing,) = await InProcessScorer("s", reward).score(ITEMS[:1])
    assert "needs completion_ids" in str(missing)


@pytest.mark.parametrize("signature", ["ours", "trl", "verl"])
async def test_a_function_changes_only_its_own_copy_of_the_columns(signature: str) -> None:
    def ours(prompts: Any, responses: Any, extra_info: Any) -> Any:
        return [float(each.pop("n")) for each in extra_info]

    def trl(completions: Any, extra_info: Any) -> Any:
        return [float(each.pop("n")) for each in extra_info]

    def verl(data_source: Any, solution_str: str, ground_truth: Any, extra_info: Any) -> Any:
        return float(extra_info.pop("n"))

    shared = {"extra_info": {"n": 1}, "references": "a"}
    items = [ScoreRequest("a", "p", "x", shared), ScoreRequest("b", "p", "x", shared)]
    functions: dict[str, Callable[..., Any]] = {"ours": ours, "trl": trl, "verl": verl}
    scorer = InProcessScorer("s", functions[signature])
    for _ in range(2):
        outcomes = await scorer.score(items)
        assert [outcome.reward for outcome in outcomes if isinstance(outcome, Score)] == [1.0, 1.0]


@pytest.mark.parametrize(
    "reward",
    [
        1,
        True,
        np.float32(1),
        np.bool_(True),
        np.array(1),
        np.array([1.0]),
        torch.tensor(1),
        torch.tensor([1.0]),
        Decimal(1),
    ],
)
async def test_numbers_of_other_libraries_are_rewards(reward: Any) -> None:
    (outcome,) = await InProcessScorer("s", lambda prompts, responses: [reward]).score(ITEMS[:1])
    assert isinstance(outcome, Score)
    assert outcome.reward == 1.0
    assert type(outcome.reward) is float
