"""The arguments of a metrics function, the scores of held-out responses, and the choice of the best version."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.data.chat_template import RenderedPrompt
from cluster.errors import InputError, RewardError
from cluster.scoring import Score, ScoreRequest
from cluster.trajectory import Trajectory, Turn
from deploy.config.load import load_run_config
from deploy.evaluation import evaluate
from deploy.evaluation.held_out import HeldOut
from deploy.evaluation.scoring import score
from rollout_actors.conversations.conversation import Conversation

ROWS = [{"prompt": "1 + 1?", "references": ["2"], "level": 1}, {"prompt": "2 + 2?", "references": ["4"], "level": 2}]


def texts_alone(prompts: Sequence[str], responses: Sequence[str]) -> dict[str, float]:
    return {"num": float(len(prompts) + len(responses))}


def names_one(prompts: Sequence[str], responses: Sequence[str], references: Sequence[list[str]]) -> dict[str, float]:
    return {"right": sum(r in each for r, each in zip(responses, references, strict=True)) / len(responses)}


def takes_all(prompts: Sequence[str], responses: Sequence[str], **columns: Any) -> dict[str, float]:
    return {name: float(len(values)) for name, values in columns.items()}


def does_without(prompts: Sequence[str], responses: Sequence[str], *, weights: Any = None) -> dict[str, float]:
    return {"is_given": float(weights is not None)}


def needs_another(prompts: Sequence[str], responses: Sequence[str], *, answers: Sequence[str]) -> dict[str, float]:
    return {}


@pytest.mark.parametrize(
    ("function", "measured"),
    [
        (texts_alone, {"num": 4.0}),
        (names_one, {"right": 0.5}),
        (takes_all, {"references": 2.0, "level": 2.0}),
        (does_without, {"is_given": 0.0}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_metrics_function_gets_the_columns_it_names_or_all(
    function: Callable[..., Any], measured: dict[str, float]
) -> None:
    assert evaluate.measure(f"{__name__}:{function.__name__}", ROWS, ["2", "5"]) == measured


def test_columns_named_like_the_texts_do_not_replace_them() -> None:
    rows = [row | {"responses": "kept from it", "prompts": "too"} for row in ROWS]
    assert evaluate.measure(f"{__name__}:takes_all", rows, ["2", "5"]) == {"references": 2.0, "level": 2.0}


def test_measure_names_a_missing_column_that_the_function_needs() -> None:
    message = r"evaluation.metrics: needs a column 'answers'; the data has references, level besides the prompt"
    with pytest.raises(InputError, match=message):
        evaluate.measure(f"{__name__}:needs_another", ROWS, ["2", "5"])


class FakeRun:
    def __init__(self) -> None:
        self.held_out: dict[str, float] | None = None

    def summary(self) -> dict[str, Any]:
        return {} if self.held_out is None else {"held_out": self.held_out}

    def update_summary(self, values: dict[str, float]) -> None:
        self.held_out = {name.removeprefix("held_out."): value for name, value in values.items()}


class FakeSession:
    """A held-out set of two prompts; `scores` are the rewards and parts of the next version's answers."""

    def __init__(self, *lines: str) -> None:
        self.config = load_run_config(Path("examples/letters/run.toml"), lines)
        self.run, self.pool, self.rows = FakeRun(), self, list[dict[str, float]]()
        self.scores: list[tuple[float, dict[str, float]]] = []

    async def rewards(self) -> FakeSession:
        return self

    async def score(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        return [Score(r.id, *score, "v") for r, score in zip(requests, self.scores, strict=True)]

    async def ask(self, method: str, rows: Sequence[Any], **_: Any) -> list[list[Conversation]]:
        return [[talk(i, reward=0.25, rude=0.0)] for i in range(len(rows))]

    async def reference_kl(self, records: Sequence[Trajectory]) -> list[float]:
        return [0.0 for _ in records]

    def record(self, stage: str, metrics: dict[str, float]) -> None:
        self.rows.append(metrics)


def talk(index: int, *, reward: float, **parts: float) -> Conversation:
    """Return a conversation of one turn with this reward from the environment."""
    turn = Turn(1, 1, reward)
    return Conversation(f"{index}", "p", [1, 2], [0.0, -1.0], [], [turn], "stop", "r", [], parts)


async def held_out(session: FakeSession, *versions: list[tuple[float, dict[str, float]]]) -> list[bool]:
    """Return whether each version was the best so far."""
    found = HeldOut(session, session)  # type: ignore[arg-type]
    found._rows = {"": [{"prompt": "p"}, {"prompt": "q"}]}
    best = []
    for step, session.scores in enumerate(versions, 1):
        best.append(await found.evaluate(step))
    return best


COST = 'learner.constraint = { cost = "safe", max_mean = 0.5 }'


async def test_a_score_adds_the_turn_rewards_and_parts_of_the_environment() -> None:
    session: Any = FakeSession()
    session.scores = [(1.0, {"safe": 1.0}), (2.0, {})]
    talks = [talk(0, reward=0.25, rude=1.0), talk(1, reward=-0.5)]
    first, second = await score(session, "", [{"prompt": "p"}] * 2, talks)
    assert (first.reward, first.parts) == (1.25, {"safe": 1.0, "rude": 1.0})
    assert (second.reward, second.parts) == (1.5, {})


async def test_a_version_within_the_cost_bound_beats_any_beyond_it() -> None:
    session = FakeSession(COST)
    beyond, less_beyond = [(9.0, {"safe": 1.0})] * 2, [(8.0, {"safe": 0.75})] * 2
    within, better = [(1.0, {"safe": 0.0}), (1.0, {"safe": 1.0})], [(2.0, {"safe": 0.5})] * 2
    assert await held_out(session, beyond, less_beyond, within, less_beyond, better, within) == [
        *(True, True, True),
        *(False, True, False),
    ]
    assert [row["cost_mean"] for row in session.rows] == [1.0, 0.75, 0.5, 0.75, 0.5, 0.5]
    assert session.run.held_out == {"step": 5, "reward_mean": 2.25, "kl_nats": 0, "objective": 2.25, "cost_mean": 0.5}


async def test_only_the_objective_decides_without_a_cost_bound() -> None:
    session = FakeSession()
    assert await held_out(session, [(1.0, {})] * 2, [(2.0, {"safe": 1.0})] * 2, [(2.0, {})] * 2) == [True, True, False]
    assert "cost_mean" not in session.rows[0]


async def test_evaluation_names_an_answer_without_the_cost() -> None:
    message = "learner.constraint.cost: the reward of held-out-1 has no part 'safe'; its parts are rude, sound"
    with pytest.raises(RewardError, match=message):
        await held_out(FakeSession(COST), [(1.0, {"safe": 0.0}), (1.0, {"sound": 0.0})])


def test_the_question_is_the_last_user_message_before_the_response() -> None:
    messages = [{"role": role, "content": text} for role, text in (("system", "s"), ("user", "a"), ("assistant", "b"))]
    conversation = Conversation("0", "", [1, 2], [0.0, -1.0], [], [Turn(1, 1)], "stop", "r", messages)
    assert evaluate.last_question(conversation, "") == "a"
    several = RenderedPrompt("<u>a<e><u>c<e>", messages=[*messages, {"role": "user", "content": "c"}])
    assert evaluate.last_question(replace(conversation, messages=[]), several) == "c"
    assert evaluate.last_question(replace(conversation, messages=[]), "a text") == ""
