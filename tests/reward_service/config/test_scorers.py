"""Valid and invalid settings of scorers."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from reward_service.config.scorers import settings_text
from reward_service.config.service import RewardServiceConfig

EXACT = {"kind": "exact"}
JUDGE = {"kind": "judge", "url": "http://127.0.0.1:1/v1", "model": "m", "rubric": "{response}"}


def config(**scorers: dict[str, Any]) -> RewardServiceConfig:
    return RewardServiceConfig.model_validate({"scorers": scorers})


def composite(**settings: Any) -> dict[str, Any]:
    return {"kind": "composite", "parts": {"a": 1.0}} | settings


@pytest.mark.parametrize(
    "section",
    [
        EXACT,
        {"kind": "numeric", "answer": r"= (\d+)", "tolerance": 0.5},
        {"kind": "math"},
        {"kind": "regex", "pattern": "^<a>.*</a>$"},
        {"kind": "length", "max": 3},
        {"kind": "length", "min": 3, "max": 3},
        {"kind": "truncation"},
        {"kind": "json_schema", "json_schema": {"$ref": "#/$defs/a", "$defs": {"a": {"type": "object"}}}},
        {"kind": "repetition"},
        {"kind": "language", "language": "en", "among": ("en", "de")},
        {"kind": "code", "cpu_s": 1, "wall_s": 1},
        {"kind": "forbidden", "phrases": ("x",)},
        {"kind": "function", "path": "m:f"},
        {"kind": "reward_model", "path": "folder"},
        JUDGE,
        JUDGE | {"low": 0, "high": 10},
    ],
    ids=lambda section: section["kind"],
)
def test_settings_of_every_kind_are_accepted(section: dict[str, Any]) -> None:
    assert config(a=section).scorers["a"].kind == section["kind"]


@pytest.mark.parametrize(
    ("section", "what"),
    [
        ({"kind": "regex", "pattern": "("}, "is not a regular expression"),
        ({"kind": "exact", "answer": "["}, "is not a regular expression"),
        ({"kind": "length"}, "min, max: give one of them"),
        ({"kind": "length", "min": 3, "max": 2}, "max: 2 is less than min, 3"),
        ({"kind": "length", "max": 2, "penalty": -1}, "greater than or equal to 0"),
        ({"kind": "json_schema"}, "json_schema, path: give one of them"),
        ({"kind": "json_schema", "json_schema": {}, "path": "x"}, "json_schema, path: give one of them"),
        ({"kind": "json_schema", "json_schema": {"type": "thing"}}, "is not a JSON schema"),
        ({"kind": "json_schema", "json_schema": {"items": {"$ref": "http://x/y"}}}, "only references to #"),
        ({"kind": "language", "language": "English"}, "should match pattern"),
        ({"kind": "language", "language": "en", "among": ("de",)}, "among: lacks the expected language, en"),
        ({"kind": "code", "cpu_s": 9, "wall_s": 3}, "wall_s: 3 is less than cpu_s, 9"),
        ({"kind": "forbidden"}, "phrases, path, function: give one of them"),
        ({"kind": "forbidden", "phrases": (" ",)}, "should match pattern"),
        ({"kind": "numeric", "tolerance": float("nan")}, "finite number"),
        (JUDGE | {"rubric": "is it good?"}, "rubric: lacks the placeholder {response}"),
        (JUDGE | {"low": 0}, "low, high: give both or neither"),
        (JUDGE | {"low": 1, "high": 1}, "high: 1 is not above low, 1"),
        (JUDGE | {"url": "ftp://x"}, "should match pattern"),
        (composite(parts={}), "at least 1 item"),
        (composite(parts={"b": float("inf")}), "finite number"),
        (composite(thresholds={"a": 1}), "thresholds: 'a' is not among the gates"),
        (composite(normalize={"b": {"mean": 0, "std": 1}}), "normalize: 'b' is not among the parts"),
        (composite(normalize={"a": {"mean": 0, "std": 0}}), "greater than 0"),
    ],
)
def test_invalid_settings_are_rejected(section: dict[str, Any], what: str) -> None:
    with pytest.raises(ValidationError) as caught:
        config(a=EXACT, b=EXACT, c=section)
    assert what in str(caught.value)


@pytest.mark.parametrize("name", ["1a", "", "a b", "ä", "a/b", "-a", "reward_model"])
def test_invalid_scorer_name_is_rejected(name: str) -> None:
    with pytest.raises(ValidationError, match=r"is not a valid name|is a reserved name"):
        config(**{name: EXACT})


@pytest.mark.parametrize("name", ["a", "Z", "a_b-c.d9"])
def test_scorer_name_starts_with_a_letter(name: str) -> None:
    assert name in config(**{name: EXACT}).scorers


@pytest.mark.parametrize(
    ("scorers", "what"),
    [
        ({"c": composite()}, "c.parts: there is no scorer 'a'"),
        ({"a": EXACT, "c": composite(gates=("b",))}, "c.gates: there is no scorer 'b'"),
        ({"a": composite()}, "a.parts: goes in a circle: a -> a"),
        ({"a": composite(parts={"b": 1}), "b": composite(parts={"reward_model": 1}, gates=("a",))}, "a -> b -> a"),
        ({"a": EXACT, "c": composite(normalize={"a": "reward_statistics"})}, "c.normalize: 'a' is not a reward model"),
    ],
)
def test_composite_that_does_not_fit_its_scorers_is_rejected(scorers: dict[str, Any], what: str) -> None:
    with pytest.raises(ValidationError) as caught:
        config(**scorers)
    assert what in str(caught.value)


def test_diamond_of_composites_is_accepted() -> None:
    left, right = composite(), composite(parts={"a": 2})
    config(a=EXACT, left=left, right=right, top=composite(parts={"left": 1, "right": 1}))


def test_reward_model_is_needed_if_it_is_used_or_a_part() -> None:
    assert RewardServiceConfig().needs_reward_model()
    assert not RewardServiceConfig(scorer="m:f").needs_reward_model()
    part = {"c": composite(parts={"reward_model": 1})}
    assert RewardServiceConfig.model_validate({"scorer": "m:f", "scorers": part}).needs_reward_model()


def test_version_depends_on_every_setting_except_file_paths() -> None:
    texts = {
        settings_text(config(a={"kind": "forbidden", "path": path}).scorers["a"]) for path in ("here.txt", "there.txt")
    }
    assert len(texts) == 1
    assert settings_text(config(a=EXACT).scorers["a"]) != settings_text(config(a=EXACT | {"strip": False}).scorers["a"])
