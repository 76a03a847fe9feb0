"""`antiphon config` prints the reference of the run file."""

from __future__ import annotations

import json

import pytest

from cluster.errors import InputError
from deploy.commands.setup.config import config


def test_a_key_is_printed_with_type_range_default_and_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    config("learner.clip", json_schema=False)
    assert capsys.readouterr().out.splitlines() == [
        "learner.clip",
        "    number; > 0; default 0.2; may change with --allow-changes",
        "    Half-width of the policy ratio's clip.",
    ]


def test_a_section_is_printed_with_its_keys_and_no_others(capsys: pytest.CaptureFixture[str]) -> None:
    config("sft", json_schema=False)
    printed = capsys.readouterr().out
    assert printed.startswith("[sft]")
    assert "sft.patience" in printed
    assert "learner." not in printed


def test_every_section_is_printed_without_a_key(capsys: pytest.CaptureFixture[str]) -> None:
    config("", json_schema=False)
    printed = capsys.readouterr().out
    for text in ("[run]", "[tasks.NAME.environment]", "[reward_service.http]", "(kind = judge)", "learner.lora.rank"):
        assert text in printed


def test_the_json_schema_is_printed_for_editors(capsys: pytest.CaptureFixture[str]) -> None:
    config("", json_schema=True)
    assert "LearnerConfig" in json.loads(capsys.readouterr().out)["$defs"]


def test_an_unknown_key_names_the_setting_that_was_meant() -> None:
    with pytest.raises(InputError, match=r"learner\.learning_rate"):
        config("learner.lr", json_schema=False)
