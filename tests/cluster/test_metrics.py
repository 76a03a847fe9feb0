"""The table of metrics names every key that the code writes, and no other."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.metrics import METRICS, metric_of

ROOT = Path(__file__).parents[2]
PACKAGES = ("cluster", "rollout_actors", "reward_service", "learner", "deploy")
TREES = [
    ast.parse(path.read_text())
    for package in PACKAGES
    for path in (ROOT / package).rglob("*.py")
    if path != ROOT / "cluster" / "metrics.py"
]
KEY = re.compile(r"(learner|rollout_actors|reward_service|cluster|tasks)/([\w{}]+/)?[a-z_{}]*[a-z}]")


def texts() -> Iterator[str]:
    """Every text of the packages' code; what a format string fills in is `{}`."""
    for node in (node for tree in TREES for node in ast.walk(tree)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id


TEXTS = set(texts())


def pattern_of(text: str) -> str:
    return re.escape(text).replace(r"\{\}", r"[\w{}]+")


@pytest.mark.parametrize("key", sorted(filter(KEY.fullmatch, TEXTS)))
def test_a_key_in_the_code_is_in_the_table(key: str) -> None:
    known = (name for name in METRICS if re.match(pattern_of(key), name))
    assert next(known, None), f"{key} is not in cluster/metrics.py"


@pytest.mark.parametrize("name", METRICS)
def test_a_name_in_the_table_is_in_the_code(name: str) -> None:
    written = name.replace("NAME", "{}").replace("_N", "_{}")
    last = written.rpartition("/")[2]
    made = (text for text in TEXTS if "{}" in text and len(text.replace("{}", "")) >= 4)
    assert any(text in (written, last) or text.endswith(f"/{last}") for text in TEXTS) or any(
        re.fullmatch(pattern_of(text), last) for text in made
    )


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("cluster/policy_lag_share_12", "cluster/policy_lag_share_N"),
        ("tasks/letters-2/reward_mean", "tasks/NAME/reward_mean"),
    ],
)
def test_a_key_with_a_task_or_number_has_the_entry_of_its_pattern(key: str, name: str) -> None:
    assert metric_of(key) is METRICS[name]


def test_every_metric_can_be_shown() -> None:
    for name, metric in METRICS.items():
        assert metric.format.format(0.5), name
        assert metric.help.endswith("."), name


def test_an_unknown_key_has_no_entry() -> None:
    assert metric_of("learner/unknown") is None
