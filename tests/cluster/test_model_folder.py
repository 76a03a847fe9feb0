"""Test which files of a model folder are its weights, and which folders are refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from cluster.errors import InputError
from cluster.model_folder import model_files, other_weight_files, tensor_shapes, weight_files

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def save(path: Path, *names: str) -> None:
    save_file({name: np.zeros((2, 3), np.float32) for name in names}, path)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A model of two shards with an index, and Mistral's copy of the same weights beside them."""
    save(tmp_path / SHARDS[0], "a")
    save(tmp_path / SHARDS[1], "b")
    save(tmp_path / "consolidated.safetensors", "layers.0.a", "layers.0.b")
    index = {"metadata": {}, "weight_map": {"a": SHARDS[0], "b": SHARDS[1]}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    return tmp_path


def test_weights_are_the_shards_of_the_index_without_other_copies(sharded: Path) -> None:
    assert [path.name for path in weight_files(sharded)] == list(SHARDS)
    assert [path.name for path in other_weight_files(sharded)] == ["consolidated.safetensors"]
    assert tensor_shapes(sharded) == {"a": (2, 3), "b": (2, 3)}


def test_weights_are_model_safetensors_without_other_copies(tmp_path: Path) -> None:
    save(tmp_path / "model.safetensors", "a")
    save(tmp_path / "consolidated.safetensors", "layers.0.a")
    assert [path.name for path in weight_files(tmp_path)] == ["model.safetensors"]
    assert [path.name for path in other_weight_files(tmp_path)] == ["consolidated.safetensors"]


def test_files_of_a_model_include_its_tokenizer_but_no_other_weights(sharded: Path) -> None:
    for name in ("config.json", "tokenizer.json", "chat_template.jinja", "README.md", "tokenizer.model"):
        (sharded / name).write_text("{}")
    found = {path.name for path in model_files(sharded)}
    assert found == {
        *SHARDS,
        "model.safetensors.index.json",
        "config.json",
        "tokenizer.json",
        "chat_template.jinja",
        "tokenizer.model",
    }


def test_a_missing_shard_is_named(sharded: Path) -> None:
    (sharded / SHARDS[1]).unlink()
    with pytest.raises(InputError, match=rf"{SHARDS[1]}: missing: model.safetensors.index.json names it"):
        weight_files(sharded)


def test_a_shard_without_a_tensor_of_the_index_is_named(sharded: Path) -> None:
    save(sharded / SHARDS[1], "c")
    with pytest.raises(InputError, match=rf"{SHARDS[1]}: does not hold b"):
        tensor_shapes(sharded)


def test_an_index_beside_another_copy_of_the_weights_is_refused(sharded: Path) -> None:
    save(sharded / "model.safetensors", "a", "b")
    with pytest.raises(InputError, match=r"has both model\.safetensors and the shards"):
        weight_files(sharded)


@pytest.mark.parametrize("index", ["{}", '{"weight_map": {}}', '{"weight_map": {"a": "../x.safetensors"}}', "[]"])
def test_an_index_that_names_no_files_of_the_folder_is_refused(tmp_path: Path, index: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(InputError, match=r"model\.safetensors\.index\.json: (is not an index|not a JSON object)"):
        weight_files(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.ckpt"])
def test_pickled_weights_are_refused_with_the_converting_command(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(InputError, match=r"convert them once: python -c .*save_pretrained\(.*-safetensors"):
        weight_files(tmp_path)


def test_weights_under_other_names_are_refused(tmp_path: Path) -> None:
    save(tmp_path / "consolidated.safetensors", "layers.0.a")
    with pytest.raises(InputError, match=r"neither model.safetensors nor .*, only consolidated.safetensors"):
        weight_files(tmp_path)


def test_a_file_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save(path, "a")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match="it is cut off"):
        tensor_shapes(tmp_path)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "is not a safetensors file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n", "git lfs pull"),
        (b"\x05\0\0\0\0\0\0\0{[]}}", "is not a safetensors file"),
        (b"\xff" * 64, "is not a safetensors file"),
    ],
)
def test_a_file_that_is_not_safetensors_is_named(tmp_path: Path, content: bytes, what: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(InputError, match=rf"model\.safetensors: .*{what}"):
        tensor_shapes(tmp_path)
