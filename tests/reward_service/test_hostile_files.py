"""Files that would run code in an unsafe reader: no code runs, and each file is rejected by name."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from cluster.data.datasets import read_examples
from cluster.data.template_limit import MAX_PASSES
from cluster.errors import InputError, RewardError
from cluster.scoring import ScoreRequest
from reward_service.http.tokens import read_tokens
from reward_service.scorers.reward_model import RewardModelScorer

ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{{ a }}{% endfor %}{% endfor %}"


class Planted:
    """Creates a folder when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.mark),))


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """Return a folder that must not be created; first checks that unpickling would create it."""
    shown = tmp_path / "shown"
    pickle.loads(pickle.dumps(Planted(shown)))  # noqa: S301
    assert shown.exists()
    return tmp_path / "mark"


@pytest.fixture
def model(reward_model_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(reward_model_folder, tmp_path / "model"))


def test_pickle_named_safetensors_is_not_loaded(model: Path, mark: Path) -> None:
    (model / "model.safetensors").write_bytes(pickle.dumps(Planted(mark)))
    with pytest.raises(InputError, match=r"^reward_model: cannot load"):
        RewardModelScorer(model)
    assert not mark.exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "training_args.bin", "model.pt"])
def test_pickle_beside_the_weights_is_rejected(model: Path, mark: Path, name: str) -> None:
    (model / name).write_bytes(pickle.dumps(Planted(mark)))
    with pytest.raises(InputError, match=rf"{name} is not safetensors"):
        RewardModelScorer(model)
    assert not mark.exists()


def test_code_in_a_model_folder_is_not_run(model: Path, mark: Path) -> None:
    (model / "evil.py").write_text(f"import os\nos.mkdir({str(mark)!r})\nclass Evil: ...\n")
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil"}}
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError):
        RewardModelScorer(model)
    assert not mark.exists()


@pytest.mark.parametrize("name", ["arrow.py_extension_type", "ray.data.arrow_tensor", "ray.data.arrow_pickled_object"])
def test_pickle_in_a_parquet_extension_type_is_not_run(tmp_path: Path, mark: Path, name: str) -> None:
    planted = pickle.dumps(Planted(mark))
    metadata = {"ARROW:extension:name": name, "ARROW:extension:metadata": planted}
    field = pa.field("prompt", pa.string(), metadata=metadata)
    table = pa.table([pa.array(["hello"])], schema=pa.schema([field]))
    pq.write_table(table, tmp_path / "prompts.parquet")
    with contextlib.suppress(InputError):  # if Ray's extension types are registered, the type is rejected by name
        assert read_examples(tmp_path / "prompts.parquet", "prompts").columns["prompt"] == ["hello"]
    assert not mark.exists()


def refused(model: Path) -> str:
    """Return the error of the model for a conversation."""
    asked = ScoreRequest("x", "", "a", {"messages": [{"role": "user", "content": "hello"}]})
    (outcome,) = RewardModelScorer(model).score_batch([asked])
    assert isinstance(outcome, RewardError)
    return outcome.what


def test_endless_chat_template_is_stopped(model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
    tokenizer.chat_template = ENDLESS
    tokenizer.save_pretrained(model)
    assert f"the chat template does not end (more than {MAX_PASSES:,} passes through loops)" in refused(model)


def test_chat_template_that_accesses_python_is_rejected(model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
    tokenizer.chat_template = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    tokenizer.save_pretrained(model)
    assert "messages: the chat template refuses it" in refused(model)


def test_pickled_token_file_is_not_loaded(tmp_path: Path, mark: Path) -> None:
    (tmp_path / "tokens.json").write_bytes(pickle.dumps(Planted(mark)))
    with pytest.raises(InputError, match="not a token file"):
        read_tokens(tmp_path / "tokens.json")
    assert not mark.exists()
