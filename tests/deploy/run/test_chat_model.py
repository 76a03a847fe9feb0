"""Chat settings of a run file reach the run's own model, and models written from it."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from cluster.data.chat_settings import SETTINGS_FILE, ChatSettings
from cluster.data.chat_template import render
from cluster.data.tokenizer import load_tokenizer
from deploy.config.load import load_run_config
from deploy.config.schema import RunConfig
from deploy.run.artifacts import model_path
from deploy.run.chat_model import prepare_chat_model
from tests.support.chat import make_tokenizer, user


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"weights")
    return tmp_path / "model"


def config(path: Path | None, template: str | None = None, **data: Any) -> RunConfig:
    model = {"path": str(path)} if path is not None else {"builder": "a:b"}
    return RunConfig.model_validate({"model": {**model, "chat_template": template}, "data": data})


def test_a_run_without_chat_settings_uses_the_model_folder_itself(tmp_path: Path, folder: Path) -> None:
    plain = config(folder)
    prepare_chat_model(plain, tmp_path / "run" / "model")
    assert not (tmp_path / "run" / "model").exists()
    assert model_path(plain, tmp_path / "run") == folder


def test_chat_settings_are_put_beside_links_to_the_model(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "run").mkdir()
    own = config(folder, "{{ own }}", system_prompt="be", chat_template_kwargs={"a": 1})
    target = model_path(own, tmp_path / "run")
    assert target == tmp_path / "run" / "model"
    for _ in range(2):
        prepare_chat_model(own, target)
    tokenizer = load_tokenizer(target)
    assert tokenizer.chat_template == "{{ own }}"
    assert tokenizer.chat_settings == ChatSettings({"a": 1}, "be")
    assert (target / "model.safetensors").read_bytes() == b"weights"
    assert load_tokenizer(folder).chat_settings == ChatSettings()
    assert load_tokenizer(folder).chat_template != "{{ own }}"


def test_a_built_model_gets_the_chat_settings(folder: Path) -> None:
    prepare_chat_model(config(None, as_messages=True), folder)
    assert load_tokenizer(folder).chat_settings == ChatSettings(as_messages=True)


def test_settings_that_the_model_folder_has_stay_unless_the_run_sets_them(tmp_path: Path, folder: Path) -> None:
    ChatSettings(system_prompt="old", as_messages=True).write(folder)
    prepare_chat_model(config(folder, system_prompt="new"), tmp_path / "own")
    assert load_tokenizer(tmp_path / "own").chat_settings == ChatSettings(system_prompt="new", as_messages=True)


DATED = "{{ strftime_now('%d.%m.%Y') }}{% for m in messages %}[user]{{ m.content }}{% endfor %}"


def test_a_run_keeps_the_day_on_which_it_started(tmp_path: Path) -> None:
    make_tokenizer(DATED).save_pretrained(tmp_path / "model")
    dated = config(tmp_path / "model")
    target = model_path(dated, tmp_path / "run")
    (tmp_path / "run").mkdir()
    prepare_chat_model(dated, target)
    assert load_tokenizer(target).chat_settings.date == date.today().isoformat()
    settings = json.loads((target / SETTINGS_FILE).read_text())
    (target / SETTINGS_FILE).write_text(json.dumps(settings | {"date": "2024-02-03"}))
    prepare_chat_model(dated, target)
    assert render(load_tokenizer(target), [user("a")], "row", is_prompt=True) == "03.02.2024[user]a"


def test_a_built_model_with_a_dated_template_keeps_the_day(tmp_path: Path) -> None:
    make_tokenizer(DATED).save_pretrained(tmp_path / "model")
    for _ in range(2):
        prepare_chat_model(config(None), tmp_path / "model")
    assert load_tokenizer(tmp_path / "model").chat_settings.date == date.today().isoformat()


def test_a_template_is_looked_for_beside_the_run_file(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "own.jinja").write_text("{{ own }}")
    run_file = tmp_path / "run.toml"
    run_file.write_text(
        f'[run]\nstages = ["sft"]\n[model]\npath = "{folder}"\nchat_template = "own.jinja"\n[data]\nsft = "a.jsonl"\n'
    )
    found = load_run_config(run_file).model.chat_template
    assert found is not None
    assert (Path.cwd() / found).read_text() == "{{ own }}"
