"""Functions in the signatures of TRL, OpenRLHF, verl and Antiphon."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from decimal import Decimal
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from cluster.errors import BatchFailed, NotApplicable, RewardError
from cluster.scoring import Score, ScoreRequest, with_trainer_state
from reward_service.functions.caller import FunctionCaller
from reward_service.functions.results import SignatureMismatch
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


async def test_trl_function_gets_the_step_and_logs_numbers() -> None:
    calls = []

    def accuracy(completions: Any, solution: Any, trainer_state: Any, log_metric: Any, log_extra: Any = None) -> Any:
        calls.append((trainer_state.global_step, trainer_state.max_steps, len(completions)))
        log_extra(column="gold", values=[1, "x"][: len(completions)])
        log_metric(name="share", value=np.float32(0.5))
        return [float(text == gold) for text, gold in zip(completions, solution, strict=True)]

    items = [
        with_trainer_state(ScoreRequest(str(i), "p", "a", {"solution": "a"}), global_step=step, max_steps=9)
        for i, step in enumerate([3, 4, 3])
    ]
    outcomes = await InProcessScorer("s", accuracy).score(items)
    assert calls == [(3, 9, 2), (4, 9, 1)]
    parts = [dict(outcome.parts) for outcome in outcomes if isinstance(outcome, Score)]
    assert parts == [
        {"s": 1.0, "share": 0.5, "gold": 1.0},
        {"s": 1.0, "share": 0.5, "gold": 1.0},
        {"s": 1.0, "share": 0.5},
    ]


async def test_trl_completion_is_the_conversation_behind_the_prompt() -> None:
    prompt: list[dict[str, Any]] = [{"role": "user", "content": "hi"}]
    answered: list[dict[str, Any]] = [
        {"role": "assistant", "content": "", "tool_calls": []},
        {"role": "tool", "content": "5"},
        {"role": "assistant", "content": "five"},
    ]

    def reward(prompts: Any, completions: Any, **kwargs: Any) -> list[float]:
        assert (prompts, completions) == ([prompt], [answered])
        return [1.0]

    item = ScoreRequest("i", "hi", "five", {"messages": prompt, "conversation": prompt + answered})
    (outcome,) = await InProcessScorer("s", reward).score([item])
    assert isinstance(outcome, Score)


async def test_verl_function_of_a_batch_gets_lists() -> None:
    def compute_score(
        data_sources: Any, solution_strs: Any, ground_truths: Any, extra_infos: Any, **kwargs: Any
    ) -> Any:
        assert data_sources == ["", ""]
        assert extra_infos[0]["num_turns"] is None
        pairs = zip(solution_strs, ground_truths, strict=True)
        return [{"score": float(text == truth), "acc": 1} for text, truth in pairs]

    assert signature_kind(compute_score) == "verl_batch"
    outcomes = await InProcessScorer("s", compute_score).score(ITEMS)
    assert [(o.reward, dict(o.parts)) for o in outcomes if isinstance(o, Score)] == [
        (1.0, {"s": 1.0, "acc": 1.0}),
        (0.0, {"s": 0.0, "acc": 1.0}),
    ]


class Weighted:
    """An object with `__call__`, as TRL's own rewards are."""

    def __init__(self, weight: float = 1.0) -> None:
        self.weight = weight

    def __call__(self, completions: list[str], **kwargs: Any) -> list[float]:
        return [self.weight * len(text) for text in completions]

    def method(self, prompts: list[str], responses: list[str], **columns: Any) -> list[float]:
        return [self.weight * len(text) for text in responses]


class AsyncWeighted:
    async def __call__(self, completions: list[str], **kwargs: Any) -> list[float]:
        return [float(len(text)) for text in completions]


def of_weight(prompts: list[str], responses: list[str], weight: float, **columns: Any) -> list[float]:
    return [weight * len(text) for text in responses]


def by_name(*, responses: list[str], **columns: Any) -> list[float]:
    return [float(len(text)) for text in responses]


def yields(prompts: list[str], responses: list[str]) -> Any:
    return (len(text) for text in responses)


def as_a_column(prompts: list[str], responses: list[str]) -> Any:
    return torch.tensor([[float(len(text))] for text in responses], requires_grad=True)


@pytest.mark.parametrize(
    ("function", "rewards"),
    [
        (Weighted(2.0), [2.0, 4.0]),
        (Weighted, [1.0, 2.0]),
        (Weighted(2.0).method, [2.0, 4.0]),
        (AsyncWeighted(), [1.0, 2.0]),
        (partial(of_weight, weight=3.0), [3.0, 6.0]),
        (partial(trl_async), [1.0, 2.0]),
        (by_name, [1.0, 2.0]),
        (yields, [1.0, 2.0]),
        (as_a_column, [1.0, 2.0]),
    ],
)
async def test_any_callable_scores_whatever_the_columns_are_called(
    function: Callable[..., Any], rewards: list[float]
) -> None:
    names = ("self", "weight", "prompts", "completions", "responses", "log_metric", "function")
    items = [replace(item, columns=dict.fromkeys(names, 7)) for item in ITEMS]
    outcomes = await InProcessScorer("s", function).score(items)
    assert [outcome.reward for outcome in outcomes if isinstance(outcome, Score)] == rewards


class NotCallable:
    pass


class NeedsArguments:
    def __init__(self, weight: float) -> None: ...

    def __call__(self, completions: list[str]) -> list[float]:
        return []


@pytest.mark.parametrize(
    ("function", "what"),
    [(NotCallable, "instances can't be called"), (NeedsArguments, "can't be made without arguments")],
)
def test_class_that_can_not_score_is_refused(function: type, what: str) -> None:
    with pytest.raises(SignatureMismatch, match=what):
        FunctionCaller(function)


@pytest.mark.parametrize("signature", ["prompts, responses, completions", "prompts, responses, queries"])
def test_a_column_named_like_another_signatures_argument_keeps_the_kind(signature: str) -> None:
    names: dict[str, Any] = {}
    exec(f"def f({signature}): ...", names)
    assert signature_kind(names["f"]) == "ours"


@pytest.mark.parametrize(
    ("signature", "what"),
    [
        ("prompts, responses, solution", "needs 'solution'; there is references, topic"),
        ("completions, solution, level", "needs 'solution', 'level'; there is"),
        ("text", "takes neither two texts by position nor the argument responses"),
    ],
)
async def test_a_call_that_does_not_fit_is_named_with_the_columns(signature: str, what: str) -> None:
    names: dict[str, Any] = {}
    exec(f"def f({signature}): ...", names)
    outcomes = await InProcessScorer("s", names["f"]).score(ITEMS)
    assert all(isinstance(outcome, BatchFailed) and what in outcome.what for outcome in outcomes)


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
