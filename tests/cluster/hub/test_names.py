"""Names of the Hub are told from local paths, and pinned to a commit."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.errors import InputError
from cluster.hub.names import RepoKind, hub_name


@pytest.mark.parametrize(
    ("text", "kind", "parts"),
    [
        ("Qwen/Qwen3-0.6B", "model", ("Qwen/Qwen3-0.6B", None, None, None)),
        ("Qwen/Qwen3-0.6B@v1.0", "model", ("Qwen/Qwen3-0.6B", "v1.0", None, None)),
        ("meta-llama/Llama-3.2-1B@refs%2Fpr%2F1", "model", ("meta-llama/Llama-3.2-1B", "refs%2Fpr%2F1", None, None)),
        ("openai/gsm8k:main/train", "dataset", ("openai/gsm8k", None, "main", "train")),
        ("openai/gsm8k@e53f:main/test", "dataset", ("openai/gsm8k", "e53f", "main", "test")),
        ("trl-lib/tldr:validation", "dataset", ("trl-lib/tldr", None, None, "validation")),
        ("trl-lib/tldr", "dataset", ("trl-lib/tldr", None, None, "train")),
    ],
)
def test_a_name_has_repository_revision_config_and_split(
    text: str, kind: RepoKind, parts: tuple[str | None, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name = hub_name(Path(text), kind)
    assert name is not None
    assert (name.repo, name.revision, name.config, name.split) == parts
    commit = "0123456789" * 4
    pinned = hub_name(Path(name.at(commit).text), kind)
    assert pinned is not None
    assert (pinned.commit, pinned.repo, pinned.config, pinned.split) == (commit, parts[0], *parts[2:])


def test_a_local_path_is_no_name_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here" / "model").mkdir(parents=True)
    local = ["here/model", "here/missing", "data/rows.jsonl", "data/rows.jsonl.gz", "/abs/model", "model", "a/b/c"]
    assert [hub_name(Path(text), "model") for text in local] == [None] * len(local)


def test_error_if_a_models_name_has_a_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"me/tiny:train: a model's name has no configuration or split"):
        hub_name(Path("me/tiny:train"), "model")
