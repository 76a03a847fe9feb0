"""A run file names models and data sets of the Hub; a run takes the same commits when it resumes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from cluster.errors import InputError
from deploy.config.inputs import check_inputs
from deploy.run.artifacts import data_path, model_path
from deploy.run.open import open_run, read_target
from tests.support.hub_server import Hub, connect, forget, go_offline, serve_hub
from tests.support.paths import ROOT

RUN = """
[run]
name = "tiny"
stages = ["ppo"]
[model]
path = "me/tiny"
[data]
prompts = "me/sums:main/train"
evaluation = "me/sums:main/test"
[rollout_actors]
max_prompt_tokens = 8
max_response_tokens = 8
[reward_service]
scorer = "mine"
[reward_service.scorers.mine]
kind = "contains"
"""
README = b"""---
configs:
- config_name: main
  data_files:
  - {split: train, path: main/train-*}
  - {split: test, path: main/test-*}
---
"""
DATA = {
    "README.md": README,
    "main/train-0.jsonl": b'{"prompt": "a", "references": "b"}\n',
    "main/test-0.jsonl": b'{"prompt": "b", "references": "b"}\n',
}


@pytest.fixture
def model(tmp_path: Path) -> dict[str, bytes]:
    settings = {"architectures": ["LlamaForCausalLM"], "max_position_embeddings": 32, "vocab_size": 3}
    Tokenizer(WordLevel({"a": 0, "b": 1, "</s>": 2}, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    tokenizer = (tmp_path / "tokenizer.json").read_bytes()
    (tmp_path / "tokenizer.json").unlink()
    return {"config.json": json.dumps(settings).encode(), "tokenizer.json": tokenizer, "model.safetensors": b"1"}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: dict[str, bytes]) -> Iterator[Hub]:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.toml").write_text(RUN.replace('kind = "contains"', 'kind = "exact"'))
    with serve_hub() as hub:
        connect(hub, monkeypatch, tmp_path)
        hub.add("models", "me/tiny", model)
        hub.add("datasets", "me/sums", DATA)
        yield hub
        forget()


def test_check_names_the_commits_and_downloads_no_weights(hub: Hub, tmp_path: Path) -> None:
    config, _ = read_target(Path("run.toml"))
    lines = "\n".join(check_inputs(config))
    model, data = (hub.repositories[name].refs["main"] for name in ("models/me/tiny", "datasets/me/sums"))
    assert f"me/tiny@{model} (LlamaForCausalLM, 3 tokens, context 32)" in lines
    assert f"me/sums@{data}:main/train (1 rows)" in lines
    assert config.run.hub_commits == {"me/tiny": model, "me/sums": data}
    assert not any("safetensors" in request for request in hub.requests)


def test_a_run_keeps_its_commits_though_the_hub_moves_on(hub: Hub, model: dict[str, bytes]) -> None:
    config, path = read_target(Path("run.toml"))
    with open_run(config, path):
        pass
    hub.add("models", "me/tiny", model | {"model.safetensors": b"2"})
    hub.add("datasets", "me/sums", DATA | {"main/train-0.jsonl": b'{"prompt": "c"}\n'})
    forget()
    for target in (Path("run.toml"), path):
        resumed, _ = read_target(target)
        assert resumed == config
        assert (model_path(resumed, path) / "model.safetensors").read_bytes() == b"1"
        (file,) = data_path(resumed, path, "prompts").iterdir()
        assert file.read_bytes() == DATA["main/train-0.jsonl"]
    fresh, _ = read_target(Path("run.toml"), fresh=True)
    assert (model_path(fresh, path) / "model.safetensors").read_bytes() == b"2"


def test_a_run_resumes_without_a_network(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    config, path = read_target(Path("run.toml"))
    with open_run(config, path):
        folders = model_path(config, path), data_path(config, path, "prompts"), data_path(config, path, "evaluation")
    go_offline(monkeypatch)
    resumed, _ = read_target(Path("run.toml"))
    check_inputs(resumed)
    assert (model_path(resumed, path), data_path(resumed, path, "prompts")) == folders[:2]


def test_error_if_a_run_names_another_revision(hub: Hub, model: dict[str, bytes]) -> None:
    config, path = read_target(Path("run.toml"))
    with open_run(config, path):
        pass
    hub.repositories["models/me/tiny"].commit(model | {"model.safetensors": b"2"}, "v2")
    changed, _ = read_target(Path("run.toml"), ['model.path = "me/tiny@v2"'])
    with pytest.raises(InputError, match=r'model\.path \(was "me/tiny@[0-9a-f]{40}", now "me/tiny@[0-9a-f]{40}"\)'):
        with open_run(changed, path):
            pass


def test_a_folder_of_that_name_comes_before_the_hub(hub: Hub, tmp_path: Path, model: dict[str, bytes]) -> None:
    folder = tmp_path / "me" / "tiny"
    folder.mkdir(parents=True)
    for name, content in model.items():
        (folder / name).write_bytes(content)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a", "references": "b"}\n')
    lines = ['data.prompts = "prompts.jsonl"', 'data.evaluation = "prompts.jsonl"']
    config, path = read_target(Path("run.toml"), lines)
    assert (model_path(config, path), config.run.hub_commits) == (Path("me/tiny"), {})
    assert not hub.requests


@pytest.mark.process
def test_the_check_command_asks_the_hub_of_the_environment(hub: Hub, tmp_path: Path) -> None:
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-m", "deploy.cli", "check", "run.toml"]
    done = subprocess.run(command, env={**environment, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "ok"
    missing = [*command, "--set", 'model.path = "me/other"']
    done = subprocess.run(missing, env={**environment, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 2
    assert "me/other: there is neither such a file or folder here nor such a model at" in done.stderr
