"""Mathematics and JSON Schema in worker processes that are killed at a deadline."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any

import pytest

from cluster.errors import RewardError
from cluster.scoring import ScoreRequest
from reward_service.config.scorers import JsonSchemaConfig, MathConfig
from reward_service.parsing.fenced import PYTHON, last_block
from reward_service.sandbox.worker import Worker, Workers
from reward_service.scorers.checked_rules import json_schema_rule, math_rule
from reward_service.scorers.rule_scorer import Rule

pytestmark = pytest.mark.process

SCHEMA = {"type": "object", "required": ["a"], "properties": {"a": {"type": "string", "pattern": "^(a|aa)+$"}}}


def item(response: str, references: Any = None) -> ScoreRequest:
    return ScoreRequest("i", "p", response, {} if references is None else {"references": references})


@pytest.fixture(scope="module")
def mathematics() -> Iterator[Rule]:
    workers = Workers("math", None, cpu_s=2.0)
    yield math_rule(MathConfig(kind="math", timeout_s=2.0), workers)
    workers.close()


@pytest.fixture(scope="module")
def schema() -> Iterator[Rule]:
    workers = Workers("json_schema", SCHEMA, cpu_s=0.5)
    yield json_schema_rule(JsonSchemaConfig(kind="json_schema", json_schema=SCHEMA, timeout_s=0.5), workers)
    workers.close()


@pytest.mark.parametrize(
    ("response", "references", "reward"),
    [
        (r"so it is $\boxed{\frac{1}{2}}$", "0.5", 1.0),
        ("the answer is 1/2", r"\frac{1}{2}", 1.0),
        ("$x^2 + 2x + 1$", "(x+1)^2", 1.0),
        ("$x^2 + 2x$", "(x+1)^2", 0.0),
        ("it is 8", [7, 8], 1.0),
        ("it is 9", [7, 8], 0.0),
        ("no idea", "3", 0.0),
        ("", "3", 0.0),
    ],
)
def test_equal_expressions_are_equal(mathematics: Rule, response: str, references: Any, reward: float) -> None:
    assert mathematics(item(response, references))[0] == reward


@pytest.mark.parametrize(
    ("response", "references", "reward"),
    [
        (r"\boxed{3} no, \boxed{4}", 4, 1.0),
        (r"\boxed{3} no, \boxed{4}", 3, 0.0),
        (r"\boxed{\frac{1}{2}} and $2 + 2 = 5$", "1/2", 1.0),
        (r"\boxed{3} and then \boxed{4", 3, 1.0),
        ("first $3$, then $4$, finally 5", 5, 1.0),
        ("so $3$ and finally $4$", 3, 0.0),
        ("it is −5", -5, 1.0),
        ("it is −5", 5, 0.0),
        ("-5", "−5", 1.0),
        ("10\u202f000", 10000, 1.0),
        (r"$10\,000$", "10{,}000", 1.0),
        ("$x²$", "x^2", 1.0),
        ("it is ½", 0.5, 1.0),
        ("１２", 12, 1.0),
        (r"$50\%$", "50%", 1.0),
    ],
)
def test_last_expression_of_a_response_counts(mathematics: Rule, response: str, references: Any, reward: float) -> None:
    assert mathematics(item(response, references))[0] == reward


def test_expression_that_uses_up_its_cpu_time_gets_0(mathematics: Rule) -> None:
    assert mathematics(item("it is 9**9**9**9**9", "3")) == (0.0, {"found": 0.0})
    assert mathematics(item("it is 3", "3"))[0] == 1.0


@pytest.mark.parametrize("references", [None, []])
def test_mathematics_without_references_is_an_error(mathematics: Rule, references: Any) -> None:
    with pytest.raises(RewardError, match="i has no references"):
        mathematics(item("3", references))


def test_a_reference_without_an_expression_is_an_error(mathematics: Rule) -> None:
    with pytest.raises(RewardError, match="no expression that can be read"):
        mathematics(item("3", ""))


@pytest.mark.parametrize(
    ("response", "reward", "parsed"),
    [
        ('{"a": "aa"}', 1.0, 1.0),
        ('```json\n{"a": "b"}\n```\nor\n```\n{"a": "a"}\n```', 1.0, 1.0),
        ('{"a": 1}', 0.0, 1.0),
        ("{}", 0.0, 1.0),
        ("[]", 0.0, 1.0),
        ('{"a": "a"', 0.0, 0.0),
        ('{"a": "a", "b": NaN}', 0.0, 0.0),
        ("[" * 100_000, 0.0, 0.0),
        ("9" * 5000, 0.0, 0.0),
        ("", 0.0, 0.0),
    ],
)
def test_json_schema_scores_valid_and_invalid_responses(
    schema: Rule, response: str, reward: float, parsed: float
) -> None:
    assert schema(item(response)) == (reward, {"parsed": parsed})


def test_json_on_which_a_schema_pattern_uses_up_its_cpu_time_gets_0(schema: Rule) -> None:
    assert schema(item('{"a": "' + "a" * 100 + '!"}')) == (0.0, {"parsed": 0.0})


def test_error_if_the_machine_gives_a_worker_no_cpu_time(monkeypatch: pytest.MonkeyPatch) -> None:
    workers = Workers("json_schema", {}, cpu_s=0.5)
    assert workers.ask("1") == {"parsed": True, "valid": True}
    process = workers._all[0]._process
    assert process is not None
    process.send_signal(signal.SIGSTOP)
    rule = json_schema_rule(JsonSchemaConfig(kind="json_schema", json_schema={}), workers)
    with pytest.raises(RewardError, match="i got too little CPU time: the machine is busy"):
        rule(item("1"))
    assert rule(item("1"))[0] == 1.0
    workers.close()


def test_last_fenced_block_is_used_or_the_whole_response() -> None:
    assert last_block("x\n```\na\n```\ny\n```python\nb\nc\n```\n") == "b\nc\n"
    assert last_block("no `block` ```here```") == "no `block` ```here```"


@pytest.mark.parametrize(
    "response",
    [
        "```python\na = 1",
        "~~~python\na = 1\n~~~\n",
        "1. So:\n\n   ```python\n   a = 1\n   ```\n",
        "      ```python\n      a = 1\n      ```",
        "Here it is: ```python\na = 1\n```\nDone.",
        "<think>\n```python\na = 1\n```",
        "````\na = 1\n````",
        "```python\r\na = 1\r\n```",
    ],
)
def test_fenced_block_is_found_however_it_is_written(response: str) -> None:
    assert last_block(response).strip() == "a = 1"


def test_block_of_the_wanted_language_comes_before_its_output() -> None:
    response = "```Python title=x\na = 1\n```\nOutput:\n```\n1\n```\n```text\n1\n```"
    assert last_block(response, PYTHON) == "a = 1\n"
    assert last_block(response) == "1\n"
    assert last_block("```\na\n```\n```\nb\n```", PYTHON) == "b\n"
    assert last_block("```{.python}\na\n```\n~~~py\nb\n~~~", PYTHON) == "b\n"


def test_fence_inside_a_longer_fence_is_its_text() -> None:
    assert last_block("~~~\n```\nx\n```\n~~~") == "```\nx\n```\n"


def test_worker_is_replaced_after_it_died() -> None:
    worker = Worker("json_schema", {}, cpu_s=5.0)
    assert worker.ask("1") == {"parsed": True, "valid": True}
    assert worker._process is not None
    worker._process.kill()
    worker._process.wait()
    with pytest.raises(RewardError, match="its process ended"):
        worker.ask("1")
    assert worker.ask("2") == {"parsed": True, "valid": True}
    worker.close()


def test_failure_inside_a_worker_is_the_items_error() -> None:
    worker = Worker("json_schema", {}, cpu_s=5.0)
    with pytest.raises(RewardError, match="TypeError"):
        worker.ask({"not": "text"})
    worker.close()
