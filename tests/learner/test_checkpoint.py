"""Checkpoints are atomic and exact, and contain nothing that is executed when read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from cluster.errors import InputError
from learner import checkpoint
from learner.distributed.ranks import Ranks
from learner.model.actor_critic import load_causal_model
from learner.model.tensors import policy_tensors

ONE = Ranks(torch.device("cpu"), distributed=False)


def save(path: Path, source: Path, tensors: dict[str, torch.Tensor]) -> None:
    model = load_causal_model(source, "float32")
    with checkpoint.shared_folder(path, ONE) as folder:
        checkpoint.write_state(folder, tensors, ONE)
        write_policy(folder / checkpoint.POLICY, model, source)
        checkpoint.write_index(folder, 3)


def write_policy(folder: Path, model: Any, source: Path) -> None:
    checkpoint.write_policy(folder, model.config, dict(policy_tensors(model, torch.float32)), source)


def test_tensors_are_restored_bit_for_bit_from_several_files(
    tmp_path: Path, policy_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "MAX_SHARD_BYTES", 100)
    tensors = {f"t{i}": torch.randn(5, i + 1) for i in range(8)} | {"half": torch.randn(3).bfloat16()}
    save(tmp_path / "step-3", policy_path, tensors)
    state = checkpoint.State(tmp_path / "step-3")
    assert state.version == 3
    assert state.names == tensors.keys()
    for name, tensor in tensors.items():
        filled = torch.zeros_like(tensor)
        state.fill(name, filled)
        assert torch.equal(state.read(name), tensor)
        assert torch.equal(filled, tensor)
    assert len(list((tmp_path / "step-3").glob("state-*.safetensors"))) > 1


def test_an_error_names_a_missing_tensor_or_one_of_another_shape(tmp_path: Path, policy_path: Path) -> None:
    save(tmp_path / "step-3", policy_path, {"t": torch.zeros(4, 2)})
    state = checkpoint.State(tmp_path / "step-3")
    for wrong, message in ((torch.zeros(4, 3), r"t is \[4, 2\]"), (torch.zeros(5, 2), "t has 4 of the 5 rows")):
        with pytest.raises(InputError, match=message):
            state.fill("t", wrong)
    with pytest.raises(InputError, match="has no u: it was made with other settings"):
        state.read("u")


def test_a_checkpoint_holds_only_safetensors_and_text(tmp_path: Path, policy_path: Path) -> None:
    save(tmp_path / "step-3", policy_path, {"t": torch.zeros(2)})
    files = [path for path in (tmp_path / "step-3").rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".safetensors", ".json"}
    for path in files:
        if path.suffix == ".json":
            json.loads(path.read_text())


def test_transformers_loads_the_policy_with_tokenizer_and_config(tmp_path: Path, policy_path: Path) -> None:
    model = load_causal_model(policy_path, "float32")
    write_policy(tmp_path / "policy", model, policy_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "policy", dtype=torch.float32)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    assert AutoTokenizer.from_pretrained(tmp_path / "policy").eos_token == "B"
    assert GenerationConfig.from_pretrained(tmp_path / "policy").temperature == 0.7


def test_an_error_names_a_folder_that_is_not_a_checkpoint(tmp_path: Path, policy_path: Path) -> None:
    with pytest.raises(InputError, match="no checkpoint"):
        checkpoint.State(tmp_path)
    save(tmp_path / "step-3", policy_path, {"t": torch.zeros(2)})
    index = tmp_path / "step-3" / checkpoint.INDEX
    index.write_text(index.read_text().replace('"format": 3', '"format": 4'))
    with pytest.raises(InputError, match="checkpoint format 4"):
        checkpoint.State(tmp_path / "step-3")
