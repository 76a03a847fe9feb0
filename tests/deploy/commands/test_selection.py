"""Which policy chat, export and evaluate use: of a run of any stages, at a step, the best, or a model folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import InputError
from deploy.commands.policy.export import export
from deploy.commands.policy.selection import selected_policy
from deploy.config.load import read_run_config
from deploy.run.artifacts import trained_policies
from deploy.run.directory import RunDirectory

SETTINGS = '[run]\nname = "r"\n[model]\npath = "{model}"\n[learner]\nnum_steps = 4\n'


def write_model(folder: Path, name: str = "Model") -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"architectures": [name], "max_position_embeddings": 64}))
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    model = write_model(tmp_path / "base")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.toml").write_text(SETTINGS.format(model=model))
    return tmp_path / "run"


def used(target: Path, **choice: Any) -> tuple[str, str]:
    """Return the folder, relative to the run or by name, and the origin of the selected policy."""
    with selected_policy(target, **choice) as policy:
        inside = policy.folder.is_relative_to(target) and policy.folder != target
        return str(policy.folder.relative_to(target) if inside else policy.folder.name), policy.origin


def trained(run: Path, step: int) -> None:
    write_model(run / "checkpoints" / "ppo" / f"step-{step:06d}" / "policy")


def test_the_newest_policy_is_used_after_any_stage(run: Path) -> None:
    assert used(run) == ("base", "the initial model")
    write_model(run / "sft")
    assert used(run) == ("sft", "SFT")
    trained(run, 2)
    assert used(run) == ("checkpoints/ppo/step-000002/policy", "PPO step 2")
    trained(run, 4)
    write_model(run / "policy")
    assert used(run) == ("policy", "PPO step 4")


def test_a_step_or_the_best_checkpoint_may_be_chosen(run: Path) -> None:
    write_model(run / "sft")
    for step in (2, 3):
        trained(run, step)
    RunDirectory(run).keep_checkpoints("ppo", newest=2, best=run / "checkpoints" / "ppo" / "step-000002")
    assert used(run, step=3)[1] == "PPO step 3"
    assert used(run, step=0) == ("sft", "SFT")
    assert used(run, best=True)[1] == "PPO step 2"
    with pytest.raises(InputError, match=r"--step: .* has no policy of step 7; there are 0, 2, 3"):
        used(run, step=7)
    with pytest.raises(InputError, match="--best: cannot be combined with --step"):
        used(run, step=2, best=True)


def test_a_model_folder_has_settings_within_its_context(run: Path, tmp_path: Path) -> None:
    with selected_policy(tmp_path / "base") as policy:
        actors = policy.config.rollout_actors
        assert actors.max_prompt_tokens + actors.max_response_tokens < 64
        assert policy.folder == policy.config.model.path == tmp_path / "base"
    with pytest.raises(InputError, match=r"--step: .* is a model folder, which has a single policy"):
        used(tmp_path / "base", step=1)


def test_a_run_without_checkpoints_has_no_best_one(run: Path) -> None:
    with pytest.raises(InputError, match=r"--best: .* has evaluated no checkpoint yet"):
        used(run, best=True)


def test_export_copies_what_a_run_trained(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_model(run / "reward_model", "RewardModel")
    export(run, tmp_path / "a")
    write_model(run / "sft")
    export(run, tmp_path / "b")
    export(run, tmp_path / "c", reward_model=True)
    export(tmp_path / "b", tmp_path / "d")
    lines = [line.partition(": ")[2] for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        "RewardModel, 0.0 MiB (the reward model)",
        "Model, 0.0 MiB (SFT)",
        "RewardModel, 0.0 MiB (the reward model)",
        "Model, 0.0 MiB (a model folder)",
    ]
    with pytest.raises(InputError, match="--reward-model: has no steps"):
        export(run, tmp_path / "e", step=2, reward_model=True)


def test_a_policy_is_evaluated_beside_the_one_its_training_began_with(run: Path, tmp_path: Path) -> None:
    config = read_run_config(run / "config.toml")
    assert trained_policies(config, run) == (None, tmp_path / "base", "")
    write_model(run / "sft")
    assert trained_policies(config, run) == (tmp_path / "base", run / "sft", "SFT")
    write_model(run / "policy")
    assert trained_policies(config, run) == (run / "sft", run / "policy", "PPO")
