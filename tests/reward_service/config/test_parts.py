"""The parts that settings name, compared with the parts of real scorers."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.scoring import Score, ScoreRequest
from reward_service.config.parts import may_have_part, part_names
from reward_service.config.service import RewardServiceConfig
from reward_service.scorers.registry import build_scorers
from reward_service.scorers.scorer import close

RULES: dict[str, dict[str, Any]] = {
    "exact": {"kind": "exact"},
    "numeric": {"kind": "numeric"},
    "math": {"kind": "math"},
    "regex": {"kind": "regex", "pattern": "a"},
    "letters": {"kind": "length", "max": 3},
    "words": {"kind": "length", "max": 3, "unit": "words"},
    "truncation": {"kind": "truncation"},
    "json_schema": {"kind": "json_schema", "json_schema": {"type": "number"}},
    "repetition": {"kind": "repetition"},
    "language": {"kind": "language", "language": "en"},
    "forbidden": {"kind": "forbidden", "phrases": ("bomb",)},
}
OPEN: dict[str, dict[str, Any]] = {
    "function": {"kind": "function", "path": "tests.support.scorers:length"},
    "guarded": {"kind": "forbidden", "phrases": ("bomb",), "function": "tests.support.scorers:length"},
}
COMPOSITES: dict[str, dict[str, Any]] = {
    "inner": {"kind": "composite", "parts": {"exact": 1.0, "function": 0.0}, "gates": ("forbidden",)},
    "outer": {"kind": "composite", "parts": {"inner": 1.0, "numeric": 1.0}},
}
ITEM = ScoreRequest("i", "p", "7", {"references": "7"})


def service(scorer: str, **changes: Any) -> RewardServiceConfig:
    return RewardServiceConfig.model_validate({"scorer": scorer, "scorers": RULES | OPEN | COMPOSITES, **changes})


@pytest.mark.process
async def test_scorers_return_the_parts_that_their_settings_name() -> None:
    scorers = build_scorers(service("outer"), None)
    for name in [*RULES, *OPEN, *COMPOSITES]:
        (outcome,) = await scorers[name].score([ITEM])
        assert isinstance(outcome, Score), outcome
        assert all(may_have_part(service(name), part) for part in outcome.parts), name
        if name in RULES:
            assert set(part_names(service(name))) == set(outcome.parts)
    for scorer in scorers.values():
        await close(scorer)


@pytest.mark.parametrize(
    ("scorer", "part", "may"),
    [
        ("forbidden", "violation", True),
        ("forbidden", "forbidden", True),
        ("forbidden", "forbidden/violation", False),
        ("inner", "forbidden/violation", True),
        ("inner", "violation", False),
        ("inner", "numeric", False),
        ("inner", "exact/exact", False),
        ("inner", "function/anything", True),
        ("outer", "inner/forbidden/violation", True),
        ("outer", "forbidden/violation", False),
        ("tests.support.scorers:length", "anything", True),
        ("reward_model", "uncertainty", True),
    ],
)
def test_parts_of_a_composite_are_named_by_their_path(scorer: str, part: str, may: bool) -> None:
    assert may_have_part(service(scorer), part) == may


def test_external_service_may_return_any_part() -> None:
    assert may_have_part(service("forbidden", url="http://127.0.0.1:9"), "anything")
