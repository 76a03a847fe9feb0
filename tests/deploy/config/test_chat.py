"""`antiphon check` reads the chat template and says what texts and settings make of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from cluster.errors import InputError
from deploy.config.chat import chat_template, check_chat, described_texts, folder_template
from deploy.config.schema import DataSection, RunConfig
from tests.support.chat import TEMPLATE, make_tokenizer

THINKING = TEMPLATE + "{% generation %}{% if enable_thinking %}a{% endif %}{% endgeneration %}"


def config(folder: Path, **data: Any) -> RunConfig:
    model = {"path": str(folder)} | {key: data.pop(key) for key in ("chat_template",) if key in data}
    return RunConfig.model_validate({"model": model, "data": data})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_tokenizer(THINKING).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_template_is_a_text_or_a_file(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "own.jinja").write_text("{{ own }}")
    assert chat_template(config(folder, chat_template=str(tmp_path / "own.jinja"))) == "{{ own }}"
    assert chat_template(config(folder, chat_template="{{ text }}")) == "{{ text }}"
    assert chat_template(config(folder)) is None
    with pytest.raises(InputError, match=r"is neither a template .* nor a file that can be read"):
        chat_template(config(folder, chat_template="missing.jinja"))


def test_an_argument_that_the_template_does_not_read_is_refused(folder: Path) -> None:
    check_chat(config(folder, chat_template_kwargs={"enable_thinking": False}))
    with pytest.raises(InputError, match="does not read 'enable_thinkng'; did you mean 'enable_thinking'") as error:
        check_chat(config(folder, chat_template_kwargs={"enable_thinkng": False}))
    assert error.value.where == "data.chat_template_kwargs"
    with pytest.raises(ValidationError, match="tools: set by Antiphon itself"):
        DataSection(chat_template_kwargs={"tools": []})


def test_a_template_with_a_syntax_error_is_refused_by_line(folder: Path) -> None:
    with pytest.raises(InputError, match="line 2: ") as error:
        check_chat(config(folder, chat_template="{{ messages }}\n{% if %}"))
    assert error.value.where == "model.chat_template"


def test_messages_need_a_template(tmp_path: Path) -> None:
    make_tokenizer(None).save_pretrained(tmp_path)
    check_chat(config(tmp_path))
    check_chat(config(tmp_path, as_messages=True, chat_template=TEMPLATE))
    with pytest.raises(InputError, match=r"has no chat template: set model\.chat_template"):
        check_chat(config(tmp_path, as_messages=True))


def test_texts_are_described_with_what_would_be_better_to_set(tmp_path: Path, folder: Path) -> None:
    assert "data.as_messages = true wraps them in it" in described_texts(config(folder), 3, "a")
    assert described_texts(config(folder, as_messages=True), 3, "a") == "3 rows of text, wrapped as messages"
    spelled = "<bos>[user]a"
    assert "<bos> is read as text; data.allow_special_tokens" in described_texts(config(folder), 3, spelled)
    assert described_texts(config(folder, allow_special_tokens=True), 3, spelled) == "3 rows"
    make_tokenizer(None).save_pretrained(tmp_path / "plain")
    assert described_texts(config(tmp_path / "plain"), 3, "a") == "3 rows"


def test_the_default_of_several_named_templates_is_read(tmp_path: Path) -> None:
    named = '[{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]'
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": ' + named + "}")
    assert folder_template(tmp_path) == "d"
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert folder_template(tmp_path) is None
