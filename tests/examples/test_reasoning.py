"""The reasoning task: sums in steps, mistakes in demonstrations, reward and metrics."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest

from cluster.scoring import ScoreRequest
from deploy.config.load import load_run_config
from examples.reasoning.data import MAX_NUMBER, SLIP_SHARE, build_data, question, results, sample_sum, worked_out
from examples.reasoning.metrics import STEP, answer_of, evaluate, is_right
from examples.reasoning.model import build_model
from reward_service.config.scorers import NumericConfig
from reward_service.scorers.rules import numeric_rule
from tests.support.chat_tasks import (
    require_built_from_the_seed_alone,
    require_small_model,
    require_tokens_keep_the_text,
    rows,
)

WORKED_OUT = "7 + 5 = 12. 12 - 3 = 9. 9 + 6 = 15. the answer is 15."


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reasoning")
    build_data(path, seed=0)
    return path


def test_a_sum_is_asked_and_worked_out_step_by_step() -> None:
    each = (7, (("+", 5), ("-", 3), ("+", 6)))
    assert question(each) == "what is 7 + 5 - 3 + 6?"
    assert results(each) == [12, 9, 15]
    assert worked_out(each, random.Random(0), slip_share=0) == WORKED_OUT


def test_every_number_on_the_way_is_small_and_no_sum_asks_for_more(data: Path) -> None:
    choice = random.Random(0)
    assert all(0 <= number <= MAX_NUMBER for _ in range(2000) for number in results(sample_sum(choice)))
    assert all(0 <= int(row["references"]) <= MAX_NUMBER for row in rows(data / "evaluation.parquet"))


def test_demonstrations_have_the_set_share_of_errors_and_carry_them_on(data: Path) -> None:
    answers = [row["completion"][0]["content"] for row in rows(data / "sft.parquet")]
    steps = [STEP.findall(answer) for answer in answers]
    assert sum(is_right(step) for each in steps for step in each) / sum(map(len, steps)) == pytest.approx(
        1 - SLIP_SHARE, abs=0.02
    )
    for each, answer in zip(steps, answers, strict=True):
        assert all(first[3] == second[0] for first, second in itertools.pairwise(each))
        assert int(each[-1][3]) == answer_of(answer)


@pytest.mark.parametrize(
    ("response", "reward"),
    [
        (WORKED_OUT, 1.0),
        ("the answer is 15.", 1.0),
        ("9 + 9 = 2. The answer is: 15", 1.0),
        ("the answer is 14. no, the answer is 15.", 1.0),
        ("the answer is 15. the answer is 14.", 0.0),
        ("15", 0.0),
        ("the answer is -15.", 0.0),
        ("the answer is fifteen.", 0.0),
        ("", 0.0),
        ("the answer is \x00💥", 0.0),
    ],
)
def test_the_run_files_scorer_and_the_metrics_read_the_last_answer_alone(response: str, reward: float) -> None:
    scorer = load_run_config(Path("examples/reasoning/run.toml")).reward_service.scorers["answer"]
    assert isinstance(scorer, NumericConfig)
    rule = numeric_rule(scorer)
    assert rule(ScoreRequest("a", "what is 7 + 5 - 3 + 6?", response, {"references": "15"}))[0] == reward
    assert evaluate(["?"], [response], references=["15"])["accuracy"] == reward


def test_metrics_count_right_steps_and_answers_that_follow_from_them() -> None:
    responses = [WORKED_OUT, "7 + 5 = 13. the answer is 12.", ""]
    measured = evaluate(["?"] * 3, responses, references=["15", "12", "1"])
    assert measured == pytest.approx({"accuracy": 2 / 3, "steps_right": 3 / 4, "steps_lead_to_answer": 1 / 3})


def test_data_follow_from_the_seed_and_held_out_sums_are_not_trained_on(tmp_path: Path) -> None:
    require_built_from_the_seed_alone(build_data, tmp_path)


def test_text_survives_the_tokens_of_a_small_model(data: Path, tmp_path: Path) -> None:
    require_tokens_keep_the_text(build_model, data, tmp_path)
    require_small_model(tmp_path)
