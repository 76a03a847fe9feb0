"""Test the table of stages: order, functions and needs."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path

import pytest

from cluster.errors import InputError
from deploy.config import schema
from deploy.config.schema import RunConfig
from deploy.run.directory import RunDirectory
from deploy.run.stages import STAGES, not_done, require_stages


def test_the_table_has_the_stages_of_the_run_file_in_order() -> None:
    assert tuple(STAGES) == schema.STAGES


@pytest.mark.parametrize("name", schema.STAGES)
def test_the_function_of_each_stage_is_a_coroutine_function_of_a_session(name: str) -> None:
    module, _, function = STAGES[name].function.partition(":")
    run = getattr(importlib.import_module(module), function)
    assert inspect.iscoroutinefunction(run)
    assert next(iter(inspect.signature(run).parameters)) == "session"


@pytest.mark.parametrize(
    ("stages", "scorer", "needed"),
    [
        ([], "m:f", {"reward_model": ["preferences"], "evaluation": []}),
        (["sft", "dpo"], "m:f", {"dpo": ["sft", "preferences"], "reward_model": ["sft", "dpo", "preferences"]}),
        (["sft", "dpo"], "m:f", {"ppo": ["sft", "dpo"], "evaluation": ["sft", "dpo"]}),
        (["sft"], "m:f", {"preferences": ["sft"], "reward_model": ["sft", "preferences"], "ppo": ["sft"]}),
        (["sft", "ppo"], "m:f", {"evaluation": ["sft", "ppo"]}),
        ([], "reward_model", {"ppo": ["reward_model"], "evaluation": ["reward_model"]}),
    ],
)
def test_a_stage_needs_others_according_to_run(stages: list[str], scorer: str, needed: dict[str, list[str]]) -> None:
    config = RunConfig.model_validate(
        {"model": {"path": "m"}, "run": {"stages": stages}, "reward_service": {"scorer": scorer}}
    )
    assert {name: STAGES[name].needed(config) for name in needed} == needed


def test_a_missing_stage_is_named_with_its_command(tmp_path: Path) -> None:
    config = RunConfig.model_validate({"model": {"path": "m"}, "run": {"stages": ["preferences", "reward_model"]}})
    with pytest.raises(InputError, match="preferences: not done \\(run antiphon preferences\\)"):
        require_stages(config, RunDirectory(tmp_path), ["reward_model"])
    require_stages(config, RunDirectory(tmp_path), ["preferences", "reward_model"])
    require_stages(config, None, ["reward_model"], have=["preferences"])
    assert str(not_done("reward_model")) == "reward_model: not trained (run antiphon reward-model)"
