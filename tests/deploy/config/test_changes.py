"""Test which settings may change within a run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic.fields import FieldInfo

from cluster.config import MayChange, Section
from deploy.config.changes import changes, refused
from deploy.config.schema import RunConfig


def sections(annotation: Any) -> Iterator[type[Section]]:
    """The sections that a type holds."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for part in get_args(annotation):
        yield from sections(part)


def fields(section: type[Section], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every field of the run file that is not itself one section, by its place."""
    for name, field in section.model_fields.items():
        inner = list(sections(field.annotation))
        if field.annotation not in inner:
            yield f"{prefix}{name}", field
        for other in inner:
            yield from fields(other, f"{prefix}{name}.")


@pytest.mark.parametrize(("key", "field"), [pytest.param(*found, id=found[0]) for found in fields(RunConfig)])
def test_every_field_declares_whether_it_may_change(key: str, field: FieldInfo) -> None:
    extra = field.json_schema_extra
    assert isinstance(extra, dict), f"{key} is not made by cluster.config.setting"
    assert extra["may_change"] in get_args(MayChange)


def config(**tables: Any) -> RunConfig:
    return RunConfig.model_validate(tables)


def kinds(before: RunConfig, now: RunConfig) -> dict[str, str]:
    return {change.key: change.may_change for change in changes(before, now)}


def test_changes_are_found_by_key_with_their_may_change() -> None:
    now = config(
        run={"seed": 1},
        learner={"clip": 0.1, "constraint": {"max_mean": 0.01}},
        rollout_actors={"num_actors": 2, "engine": {"max_num_seqs": 8, "dtype": "half"}},
        reward_service={"scorers": {"short": {"kind": "length", "max": 3}}},
    )
    assert kinds(config(), now) == {
        "run.seed": "never",
        "rollout_actors.num_actors": "always",
        "rollout_actors.engine.max_num_seqs": "always",
        "rollout_actors.engine.dtype": "recorded",
        "reward_service.scorers.short": "recorded",
        "learner.clip": "recorded",
    }


def test_the_number_of_steps_may_only_be_raised() -> None:
    short, long = config(learner={"num_steps": 10}), config(learner={"num_steps": 20})
    assert kinds(short, long) == {"learner.num_steps": "always"}
    assert kinds(long, short) == {"learner.num_steps": "never"}


def test_a_setting_of_one_scorer_is_found_under_its_name() -> None:
    def scorers(**judge: Any) -> RunConfig:
        length = {"kind": "length", "max": 3}
        return config(reward_service={"scorers": {"short": {**length, **judge}}})

    (change,) = changes(scorers(), scorers(penalty=2.0))
    assert (change.key, change.may_change) == ("reward_service.scorers.short.penalty", "recorded")
    assert change.reevaluates, "policies are evaluated with the scorer"


def test_a_free_section_may_always_change() -> None:
    now = config(reward_model={"batch_size": 8})
    assert [change.may_change for change in changes(config(), now)] == ["never"]
    assert [change.may_change for change in changes(config(), now, free=["reward_model"])] == ["always"]


def test_the_refusal_lists_changes_by_kind_and_what_to_do() -> None:
    now = config(run={"seed": 1}, learner={"clip": 0.1}, rollout_actors={"num_actors": 2})
    why = refused(changes(config(), now), allow_recorded=True)
    assert why is not None
    assert "run.seed (was 0, now 1) may not change within a run" in why
    assert "learner.clip (was 0.2, now 0.1) may change with --allow-changes" in why
    assert "rollout_actors.num_actors (was 1, now 2) may change at any time" in why
    assert why.index("another --name") < why.index("--fresh")


def test_recorded_changes_are_refused_unless_they_are_allowed() -> None:
    changed = changes(config(), config(learner={"clip": 0.1}))
    why = refused(changed, allow_recorded=False)
    assert why is not None
    assert "add --allow-changes" in why
    assert refused(changed, allow_recorded=True) is None


def test_a_path_is_compared_as_a_path() -> None:
    before, now = config(data={"evaluation": Path("a")}), config(data={"evaluation": Path("b")})
    (change,) = changes(before, now)
    assert str(change) == 'data.evaluation (was "a", now "b")'
    assert (change.may_change, change.reevaluates) == ("always", True)
