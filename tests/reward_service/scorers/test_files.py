"""Valid and invalid files that scorer settings name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster.errors import InputError
from reward_service.config.composite import Statistics
from reward_service.config.scorers import ForbiddenConfig, JsonSchemaConfig
from reward_service.scorers.files import read_phrases, read_schema, read_statistics, require_reward_model


def test_phrases_of_settings_and_file_are_forbidden_together(tmp_path: Path) -> None:
    path = tmp_path / "phrases.txt"
    path.write_text(" one \n\ntwo words\n", encoding="utf-8")
    config = ForbiddenConfig(kind="forbidden", phrases=("zero",), path=path)
    assert read_phrases(config) == ["zero", "one", "two words"]


@pytest.mark.parametrize(
    ("content", "what"),
    [(None, "cannot be read (No such file or directory)"), (b"\xff", "cannot be read"), (b" \n", "has no phrases")],
)
def test_a_file_without_phrases_is_named(tmp_path: Path, content: bytes | None, what: str) -> None:
    path = tmp_path / "phrases.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_phrases(ForbiddenConfig(kind="forbidden", path=path))
    assert caught.value.where == str(path)
    assert what in caught.value.what


def test_a_schema_is_read_from_its_file(tmp_path: Path) -> None:
    path = tmp_path / "schema.json"
    path.write_text('{"type": "object"}')
    assert read_schema(JsonSchemaConfig(kind="json_schema", path=path)) == {"type": "object"}


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "not a JSON object"),
        ('{"type": "x"}', "is not a JSON schema"),
        ('{"$ref": "y.json"}', "refers to y.json"),
    ],
)
def test_invalid_schema_file_is_named(tmp_path: Path, content: str, what: str) -> None:
    path = tmp_path / "schema.json"
    path.write_text(content)
    with pytest.raises(InputError) as caught:
        read_schema(JsonSchemaConfig(kind="json_schema", path=path))
    assert caught.value.where == str(path)
    assert what in caught.value.what


def test_statistics_are_read_from_the_model_folder(tmp_path: Path) -> None:
    (tmp_path / "reward_statistics.json").write_text('{"mean": 1, "std": 2.5, "num": 9}')
    assert read_statistics(tmp_path) == Statistics(mean=1.0, std=2.5)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (None, "cannot be read"),
        ('{"mean": 1.0}', "std: "),
        ('{"mean": 1.0, "std": 0.0}', "std: "),
        ('{"mean": "1", "std": 1.0}', "mean: "),
        ('{"mean": NaN, "std": 1.0}', "mean: "),
        ('{"mean": 1.0, "std": Infinity}', "std: "),
    ],
)
def test_invalid_statistics_file_is_named(tmp_path: Path, content: str | None, what: str) -> None:
    if content is not None:
        (tmp_path / "reward_statistics.json").write_text(content)
    with pytest.raises(InputError) as caught:
        read_statistics(tmp_path)
    assert caught.value.where == str(tmp_path / "reward_statistics.json")
    assert what in caught.value.what


@pytest.mark.parametrize(
    ("files", "what"),
    [
        ([], "it has no config.json"),
        (["config.json"], "no *.safetensors in the model folder"),
        (["config.json", "pytorch_model.bin"], "its weights are in pytorch_model.bin"),
        (["config.json", "model.safetensors", "pytorch_model.bin"], "pytorch_model.bin is not safetensors"),
        (["config.json", "model.safetensors", "x.pkl"], "x.pkl is not safetensors"),
    ],
)
def test_folder_without_a_safetensors_reward_model_is_rejected(tmp_path: Path, files: list[str], what: str) -> None:
    for name in files:
        (tmp_path / name).write_text(json.dumps({}))
    with pytest.raises(InputError, match=r"^here: ") as caught:
        require_reward_model(tmp_path, "here")
    assert what in caught.value.what
    (tmp_path / "config.json").touch()
    (tmp_path / "model.safetensors").touch()
    for name in ("pytorch_model.bin", "x.pkl"):
        (tmp_path / name).unlink(missing_ok=True)
    require_reward_model(tmp_path, "here")
