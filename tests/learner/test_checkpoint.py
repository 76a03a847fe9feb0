"""Checkpoints: whole or not at all, exact, and free of anything that runs when it is read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from cluster.errors import InputError
from learner import checkpoint
from learner.actor_critic import load_causal_model


def save(path: Path, source: Path, tensors: dict[str, torch.Tensor]) -> None:
    model = load_causal_model(source, "float32")
    checkpoint.save_checkpoint(
        path, version=3, model=model, source=source, tensors=tensors, extra={"position.json": "{}"}
    )


def test_tensors_come_back_bit_for_bit_from_several_files(
    tmp_path: Path, policy_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "MAX_SHARD_BYTES", 100)
    tensors = {f"t{i}": torch.randn(5, i + 1) for i in range(8)} | {"half": torch.randn(3).bfloat16()}
    save(tmp_path / "step-3", policy_path, tensors)
    version, loaded = checkpoint.load_checkpoint(tmp_path / "step-3")
    assert version == 3
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    assert len(list((tmp_path / "step-3").glob("state-*.safetensors"))) > 1
    assert (tmp_path / "step-3" / "position.json").read_text() == "{}"


def test_a_checkpoint_holds_safetensors_and_text_alone(tmp_path: Path, policy_path: Path) -> None:
    save(tmp_path / "step-3", policy_path, {"t": torch.zeros(2)})
    files = [path for path in (tmp_path / "step-3").rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".safetensors", ".json"}
    for path in files:
        if path.suffix == ".json":
            json.loads(path.read_text())


def test_the_policy_is_a_folder_that_transformers_loads_with_tokenizer_and_generation_config(
    tmp_path: Path, policy_path: Path
) -> None:
    model = load_causal_model(policy_path, "float32")
    checkpoint.save_policy(tmp_path / "policy", model, policy_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "policy", dtype=torch.float32)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    assert AutoTokenizer.from_pretrained(tmp_path / "policy").eos_token == "B"
    assert GenerationConfig.from_pretrained(tmp_path / "policy").temperature == 0.7


def test_a_folder_is_replaced_whole_or_kept(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    with checkpoint.whole_folder(path) as folder:
        (folder / "a").write_text("first")
    with pytest.raises(FileNotFoundError), checkpoint.whole_folder(path) as folder:
        (folder / "a").write_text((tmp_path / "not there").read_text())
    assert (path / "a").read_text() == "first"
    with checkpoint.whole_folder(path) as folder:
        (folder / "b").write_text("third")
    assert [file.name for file in path.iterdir()] == ["b"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder"]


def test_what_is_no_checkpoint_is_refused_with_its_path(tmp_path: Path, policy_path: Path) -> None:
    with pytest.raises(InputError, match="no checkpoint"):
        checkpoint.load_checkpoint(tmp_path)
    save(tmp_path / "step-3", policy_path, {"t": torch.zeros(2)})
    index = tmp_path / "step-3" / checkpoint.INDEX
    index.write_text(index.read_text().replace('"format": 2', '"format": 3'))
    with pytest.raises(InputError, match="checkpoint format 3"):
        checkpoint.load_checkpoint(tmp_path / "step-3")
