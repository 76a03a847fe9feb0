"""Models and data sets come from a local server that speaks the Hub's routes, through the Hub's own libraries."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from cluster.errors import InputError
from cluster.hub.download import commit_of, local_data, local_model
from cluster.hub.names import hub_name
from tests.support.hub_server import Hub, connect, forget, go_offline, serve_hub

MODEL = {
    "config.json": b'{"model_type": "qwen3"}',
    "tokenizer.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
    "model.safetensors": b"weights",
    "consolidated.safetensors": b"the same weights for another program",
    "onnx/model.onnx": b"other",
    "pytorch_model.bin": b"pickle",
    "modeling.py": b"code",
}
README = b"""---
configs:
- config_name: main
  data_files:
  - {split: train, path: main/train-*}
  - {split: test, path: main/test-*}
- config_name: socratic
  data_files:
  - {split: train, path: socratic/train-*}
---
"""


def rows(*prompts: str) -> bytes:
    return "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts).encode()


DATA = {
    "README.md": README,
    "main/train-0.jsonl": rows("a", "b"),
    "main/train-1.jsonl": rows("c"),
    "main/test-0.jsonl": rows("t"),
    "socratic/train-0.jsonl": rows("s"),
}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.chdir(tmp_path)
    with serve_hub() as hub:
        connect(hub, monkeypatch, tmp_path)
        yield hub
        forget()


def contents(folder: Path) -> bytes:
    return b"".join(file.read_bytes() for file in sorted(folder.iterdir()))


def pinned(text: str, kind: str = "model") -> str:
    name = hub_name(Path(text), "dataset" if kind == "dataset" else "model")
    assert name is not None
    return commit_of(name)


def test_a_model_is_downloaded_without_code_and_pickles(hub: Hub) -> None:
    commit = hub.add("models", "me/tiny", MODEL)
    folder = local_model(Path("me/tiny"))
    assert folder.name == commit == pinned("me/tiny")
    names = {"config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors"}
    assert {file.name for file in folder.rglob("*") if file.is_file()} == names
    assert (folder / "model.safetensors").read_bytes() == b"weights"


def test_settings_come_without_weights(hub: Hub) -> None:
    hub.add("models", "me/tiny", MODEL)
    folder = local_model(Path("me/tiny"), weights=False)
    assert (folder / "config.json").is_file()
    assert not (folder / "model.safetensors").exists()
    assert (local_model(Path("me/tiny")) / "model.safetensors").is_file()


def test_a_commit_stays_though_the_branch_moves(hub: Hub) -> None:
    commit = hub.add("models", "me/tiny", MODEL)
    hub.add("models", "me/tiny", MODEL | {"model.safetensors": b"newer"})
    folder = local_model(Path(f"me/tiny@{commit}"))
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    assert (local_model(Path("me/tiny")) / "model.safetensors").read_bytes() == b"newer"


@pytest.mark.parametrize("weights", [True, False])
def test_error_if_a_model_has_pickled_weights_only(hub: Hub, weights: bool) -> None:
    hub.add("models", "me/old", {"config.json": b"{}", "pytorch_model.bin": b"pickle"})
    with pytest.raises(InputError, match=r"me/old: has its weights as pickle files only.*save_pretrained"):
        local_model(Path("me/old"), weights=weights)


def test_error_names_what_the_hub_does_not_have(hub: Hub) -> None:
    hub.add("models", "me/tiny", MODEL)
    with pytest.raises(InputError, match=r"me/typo: there is neither such a file or folder here nor such a model at"):
        local_model(Path("me/typo"))
    with pytest.raises(InputError, match=r"me/tiny@v9: me/tiny has no revision 'v9'"):
        local_model(Path("me/tiny@v9"))


def test_error_if_a_gated_model_needs_a_login(hub: Hub) -> None:
    hub.add("models", "me/gated", MODEL, gated=True)
    with pytest.raises(InputError, match=r"me/gated: is gated: accept .*/me/gated.*hf auth login.*HF_TOKEN"):
        local_model(Path("me/gated"))


def test_what_was_downloaded_is_found_offline(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("models", "me/tiny", MODEL)
    hub.add("datasets", "me/sums", DATA)
    folders = local_model(Path("me/tiny")), local_data(Path("me/sums:main/train"))
    go_offline(monkeypatch)
    hub.requests.clear()
    assert (local_model(Path("me/tiny")), local_data(Path("me/sums:main/train"))) == folders
    assert not hub.requests


def test_error_offline_says_which_command_downloads(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    go_offline(monkeypatch)
    with pytest.raises(InputError, match=r"HF_HUB_OFFLINE is set.*`hf download me/tiny --revision v1`"):
        local_model(Path("me/tiny@v1"))
    with pytest.raises(InputError, match=r"`hf download me/sums --repo-type dataset`"):
        local_data(Path("me/sums:main/train"))


def test_error_if_the_hub_is_unreachable(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(InputError, match=r"can't be reached \(.*`hf download me/tiny`"):
        local_model(Path("me/tiny"))


def test_a_split_has_the_files_of_its_configuration(hub: Hub) -> None:
    hub.add("datasets", "me/sums", DATA)
    files = {
        text: local_data(Path(text)) for text in ("me/sums:main/train", "me/sums:main/test", "me/sums:socratic/train")
    }
    contents = {
        text: b"".join(file.read_bytes() for file in sorted(folder.iterdir())) for text, folder in files.items()
    }
    assert list(contents.values()) == [rows("a", "b", "c"), rows("t"), rows("s")]


def test_splits_are_inferred_from_names_of_files(hub: Hub) -> None:
    hub.add("datasets", "me/plain", {"train.jsonl": rows("a"), "test.jsonl": rows("t")})
    assert [file.read_bytes() for file in local_data(Path("me/plain")).iterdir()] == [rows("a")]
    assert [file.read_bytes() for file in local_data(Path("me/plain:test")).iterdir()] == [rows("t")]


def test_error_names_the_configurations_and_splits_there_are(hub: Hub) -> None:
    hub.add("datasets", "me/sums", DATA)
    with pytest.raises(InputError, match=r"no split 'dev'; its splits: train, test"):
        local_data(Path("me/sums:main/dev"))
    with pytest.raises(InputError, match=r"main.*socratic"):
        local_data(Path("me/sums:other/train"))
    with pytest.raises(InputError, match=r"main.*socratic"):
        local_data(Path("me/sums:train"))


def test_a_whole_download_is_read_offline(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import snapshot_download

    hub.add("datasets", "me/sums", DATA)
    snapshot_download("me/sums", repo_type="dataset")
    go_offline(monkeypatch)
    folder = local_data(Path("me/sums:main/train"))
    assert contents(folder) == rows("a", "b", "c")
