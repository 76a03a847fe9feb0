"""Test that a run knows the contents of its inputs, and refuses or reports what changed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from cluster.errors import InputError
from deploy.commands.history.retraining import replay_run
from deploy.config.load import load_run_config
from deploy.config.schema import RunConfig
from deploy.run import inputs_digest
from deploy.run.directory import RunDirectory
from deploy.run.inputs_digest import InputDigests
from deploy.run.open import open_run, read_target

RUN = """
[run]
name = "tiny"
stages = ["sft", "reward_model", "ppo", "evaluation"]
[model]
path = "model"
chat_template = "template.jinja"
[data]
sft = "sft.jsonl"
prompts = "prompts"
preferences = "preferences.jsonl"
evaluation = "held_out.jsonl"
[learner]
num_steps = 20
advantages = "estimator:advantages"
[reward_service]
scorer = "scorers:length"
[reward_service.scorers.banned]
kind = "forbidden"
path = "banned.txt"
[evaluation]
metrics = "metrics:words"
"""
FILES = {
    "run.toml": RUN,
    "template.jinja": "{% for m in messages %}{{ m.content }}{% endfor %}",
    "sft.jsonl": '{"prompt": "a", "completion": "b"}\n',
    "prompts/train-0.jsonl": '{"prompt": "a"}\n',
    "prompts/train-1.jsonl": '{"prompt": "b"}\n',
    "preferences.jsonl": '{"prompt": "a", "chosen": "b", "rejected": "c"}\n',
    "held_out.jsonl": '{"prompt": "c"}\n',
    "banned.txt": "bad\n",
    "estimator.py": "def advantages(signals): ...\n",
    "scorers.py": "from helpers import measure\n\ndef length(prompts, responses, **columns): ...\n",
    "helpers.py": "def measure(text): return len(text)\n",
    "metrics.py": "def words(prompts, responses): ...\n",
    "model/config.json": "{}",
    "model/tokenizer.json": "{}",
}


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A task with an input of every kind, in the working directory."""
    monkeypatch.chdir(tmp_path)
    for name, content in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)
    save_file({"embed_tokens.weight": np.zeros((2, 2), np.float32)}, tmp_path / "model" / "model.safetensors")
    return tmp_path


def settings(*lines: str) -> RunConfig:
    return load_run_config(Path("run.toml"), lines)


def begin(config: RunConfig) -> RunDirectory:
    """Start the run and leave it in the middle of its stages, with held-out rewards and an evaluation."""
    path = (config.run.runs_dir / config.run.name).absolute()
    with open_run(config, path) as run:
        run.update_summary({"held_out.objective": 1.0, "evaluation.after.words": 2.0})
        (path / "metrics.jsonl").write_text('{"stage": "ppo", "step": 12}\n')
        for stage in ("sft", "reward_model", "ppo"):
            (path / "checkpoints" / stage / "step-000010").mkdir(parents=True)
    return RunDirectory(path)


def finish(run: RunDirectory, *stages: str) -> None:
    artifacts = {"sft": ["sft"], "reward_model": ["reward_model"], "ppo": ["policy", "checkpoints/ppo/step-000020"]}
    for folder in (folder for stage in stages for folder in artifacts.get(stage, [])):
        (run.path / folder).mkdir(parents=True)
        (run.path / folder / "config.json").write_text("{}")
    if "evaluation" in stages:
        (run.path / "evaluation").mkdir()
        (run.path / "evaluation" / "after.parquet").touch()


def refusal(config: RunConfig, run: RunDirectory, **options: Any) -> str:
    before = (run.path / "inputs.json").read_bytes()
    with pytest.raises(InputError) as refused, open_run(config, run.path, **options):
        pass
    assert refused.value.where == str(run.path)
    assert (run.path / "inputs.json").read_bytes() == before
    return refused.value.what


@pytest.mark.parametrize(
    ("file", "named"),
    [
        ("sft.jsonl", "data.sft (sft.jsonl: sha256 was "),
        ("prompts/train-1.jsonl", "data.prompts (prompts: prompts/train-1.jsonl changed; sha256 was "),
        ("preferences.jsonl", "data.preferences (preferences.jsonl: sha256 was "),
        ("model/tokenizer.json", "model.path (model: tokenizer.json changed; sha256 was "),
        ("template.jinja", "model.chat_template (template.jinja: sha256 was "),
        ("model/model.safetensors", "model.path (model: model.safetensors changed; sha256 was "),
    ],
)
def test_a_changed_data_set_or_model_is_refused_by_name(task: Path, file: str, named: str) -> None:
    run = begin(settings())
    with (task / file).open("ab") as changed:
        changed.write(b" \n")
    what = refusal(settings(), run, allow_changes=True)
    assert what.startswith(f"contents of the run's inputs have changed: {named}")
    assert "may not change within a run. To continue: restore what was there, or give the run another --name" in what
    with open_run(settings(), run.path, fresh=True):
        pass
    with open_run(settings(), run.path):
        pass


def test_inputs_may_change_while_nothing_has_been_made_of_them(task: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open_run(settings(), Path("runs/tiny").absolute()) as run:
        pass
    for name in ("sft.jsonl", "prompts/train-1.jsonl", "model/tokenizer.json", "banned.txt", "scorers.py"):
        (task / name).write_text(FILES[name] + "\n")
    with open_run(settings(), run.path):
        pass
    assert capsys.readouterr().err == ""
    (run.path / "checkpoints" / "sft" / "step-000001").mkdir(parents=True)
    (task / "prompts" / "train-1.jsonl").write_text("{}\n")
    with open_run(settings(), run.path):
        pass
    (task / "sft.jsonl").write_text("{}\n")
    assert "data.sft" in refusal(settings(), run)


def test_a_shard_that_is_new_or_gone_is_named(task: Path) -> None:
    run = begin(settings())
    (task / "prompts" / "train-0.jsonl").rename(task / "prompts" / "train-2.jsonl")
    assert "prompts/train-0.jsonl is gone, prompts/train-2.jsonl is new" in refusal(settings(), run)


def test_inputs_that_are_touched_or_restored_are_the_same(task: Path) -> None:
    run = begin(settings())
    (task / "prompts" / "train-1.jsonl").write_text("{}")
    refusal(settings(), run)
    for name in ("prompts/train-1.jsonl", "sft.jsonl", "scorers.py"):
        (task / name).unlink()
        (task / name).write_text(FILES[name])
    with open_run(settings(), run.path) as opened:
        assert opened.summary()["held_out"] == {"objective": 1.0}


@pytest.mark.parametrize("file", ["banned.txt", "estimator.py"])
def test_a_scorers_file_and_an_estimator_may_change_if_allowed(task: Path, file: str) -> None:
    run = begin(settings())
    (task / file).write_text("changed\n")
    assert "may change with --allow-changes. To continue: restore what was there, or add" in refusal(settings(), run)
    with open_run(settings(), run.path, allow_changes=True):
        pass
    (entry,) = [entry for entry in json.loads((run.path / "inputs.json").read_text()).values() if "earlier" in entry]
    (earlier,) = entry["earlier"]
    assert (earlier["digest"], earlier["until_step"]) == (hashlib.sha256(FILES[file].encode()).hexdigest(), 12)


@pytest.mark.parametrize("file", ["scorers.py", "helpers.py"])
def test_changed_code_of_a_scorer_is_reported_with_the_step(
    task: Path, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = begin(settings())
    before = json.loads((run.path / "inputs.json").read_text())["reward_service.scorer"]["digest"]
    with (task / file).open("a") as code:
        code.write("# another rule\n")
    with open_run(settings(), run.path) as opened:
        assert opened.summary() == {}, "neither the best checkpoint nor the evaluation is compared over the change"
    now = json.loads((run.path / "inputs.json").read_text())["reward_service.scorer"]["digest"]
    what = f"scorers:length: {Path(file).stem} changed; sha256 was {before[:12]}, is {now[:12]}"
    assert capsys.readouterr().err == (
        f"changed since the last command: reward_service.scorer ({what}); used from step 13 on, the evaluation is "
        "repeated, earlier held-out rewards are not compared with later ones\n"
    )
    with open_run(settings(), run.path):
        assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("file", "kept"), [("metrics.py", {"objective": 1.0}), ("held_out.jsonl", None)])
def test_changed_metrics_or_held_out_prompts_repeat_the_evaluation(
    task: Path, file: str, kept: object, capsys: pytest.CaptureFixture[str]
) -> None:
    run = begin(settings())
    with (task / file).open("a") as changed:
        changed.write("\n")
    with open_run(settings(), run.path) as opened:
        assert opened.summary() == ({"held_out": kept} if kept else {})
    assert "the evaluation is repeated" in capsys.readouterr().err


def test_a_change_that_only_finished_stages_read_is_reported(task: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = begin(settings())
    finish(run, "sft", "reward_model")
    for name in ("sft.jsonl", "preferences.jsonl", "model/config.json"):
        (task / name).write_text(FILES[name] + "\n")
    with open_run(settings(), run.path):
        pass
    reported = capsys.readouterr().err.splitlines()
    assert [line.rpartition("; ")[2] for line in reported] == ["the stages that read it are done"] * 3
    finish(run, "ppo", "evaluation")
    (task / "prompts" / "train-1.jsonl").write_text("{}")
    with open_run(settings(), run.path) as opened:
        assert opened.is_done("evaluation", settings())


def test_prompts_that_changed_after_training_are_refused_for_more_steps(task: Path) -> None:
    run = begin(settings())
    finish(run, "sft", "reward_model", "ppo", "evaluation")
    (task / "prompts" / "train-1.jsonl").write_text("{}")
    assert "data.prompts" in refusal(settings("learner.num_steps = 30"), run)


def test_what_a_builder_wrote_belongs_to_the_run(task: Path) -> None:
    builders = 'data = { builder = "scorers:data", sft = "sft.jsonl", preferences = "preferences.jsonl" }'
    (task / "run.toml").write_text(RUN.replace(RUN[RUN.index("[data]") : RUN.index("[learner]")], ""))
    config = settings(builders)
    built = Path("runs/tiny/data/prompts.parquet")
    built.unlink(missing_ok=True)
    run = begin(config)
    built.parent.mkdir(parents=True)
    built.write_bytes(b"rows")
    with open_run(config, run.path):
        pass
    built.write_bytes(b"others")
    assert "data.builder (prompts) (RUN/data/prompts.parquet: sha256 was " in refusal(config, run)


def test_a_replay_refuses_another_model_or_estimator(task: Path) -> None:
    run = begin(settings())
    (task / "estimator.py").write_text("changed\n")
    with pytest.raises(InputError, match=r"^learner.advantages: has changed since the run read it: .* restore it"):
        replay_run(run, steps=None, what_if=(), tokens=False)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files whose contents are read to digest them."""
    found: list[str] = []
    original: Callable[..., Any] = hashlib.file_digest

    def file_digest(file: Any, name: str) -> Any:
        found.append(Path(file.name).name)
        return original(file, name)

    monkeypatch.setattr(hashlib, "file_digest", file_digest)
    return found


def test_a_large_file_is_read_again_only_if_its_state_changed(task: Path, reads: list[str]) -> None:
    weights = task / "model" / "model.safetensors"
    weights.write_bytes(b"\0" * (inputs_digest.ALWAYS_READ_BYTES + 1))
    os.utime(weights, ns=(10**18, 10**18))
    run = begin(settings())
    assert reads.count(weights.name) == 1
    with open_run(settings(), run.path):
        assert reads.count(weights.name) == 1
    assert reads.count("config.json") > 1
    os.utime(weights, ns=(10**18, 10**18 + 1))
    assert InputDigests(settings(), run.path).changed() == []
    assert reads.count(weights.name) == 2


def test_a_large_file_that_was_just_written_is_read_again(task: Path, reads: list[str]) -> None:
    (task / "model" / "model.safetensors").write_bytes(b"\0" * (inputs_digest.ALWAYS_READ_BYTES + 1))
    run = begin(settings())
    InputDigests(settings(), run.path)
    assert reads.count("model.safetensors") > 1


def test_a_run_goes_on_from_another_working_directory(
    task: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = begin(settings())
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    config, path = read_target(run.path)
    assert config.data.sft == task / "sft.jsonl"
    assert config.run.module_folders == (task,)
    with open_run(config, path) as opened:
        assert opened.summary()["held_out"] == {"objective": 1.0}
    monkeypatch.chdir(tmp_path_factory.mktemp("a third place"))
    with open_run(*read_target(run.path)):
        pass
    monkeypatch.chdir(task)
    with open_run(*read_target(run.path)):
        pass
    with open_run(load_run_config(Path("run.toml")), run.path):
        pass
