"""`antiphon label`: the policy it uses, pairs sampled and scored once, and the service until an interrupt."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import types
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import httpx
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from typer.testing import CliRunner

from cluster.errors import InputError, RewardError
from cluster.scoring import Score, ScoreRequest
from deploy.cli import app
from deploy.commands.rewards import labelling
from deploy.config.load import load_run_config, read_run_config
from deploy.run.artifacts import feedback_settings, newest_policy
from deploy.run.directory import RunDirectory
from deploy.run.layout import FEEDBACK
from deploy.run.open import open_run
from reward_service.feedback.schemas import Preference
from reward_service.feedback.store import FeedbackStore
from tests.support.paths import ROOT

RUN = """
[run]
stages = ["ppo"]
[model]
path = "model"
[data]
prompts = "prompts.jsonl"
[reward_service]
scorer = "tests.support.scorers:length"
[learner]
num_steps = 4
"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDirectory:
    """A run without any finished stage, with a model to start from and prompts."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ANTIPHON_TOKEN", raising=False)
    policy(tmp_path / "model")
    (tmp_path / "prompts.jsonl").write_text("".join(f'{{"prompt": "prompt {i}", "answer": {i}}}\n' for i in range(50)))
    (tmp_path / "run.toml").write_text(RUN)
    config = load_run_config(tmp_path / "run.toml", ['run.name = "r"'])
    with open_run(config, tmp_path / "r") as opened:
        return opened


def policy(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(str(folder).encode())
    Tokenizer(WordLevel({"a": 0}, unk_token="a")).save(str(folder / "tokenizer.json"))


@dataclasses.dataclass
class Engine:
    """A fake session that samples; `texts` returns the responses to a prompt."""

    texts: Callable[[str], list[str]] = lambda prompt: [f"{prompt} a", f"{prompt} a", f"{prompt} b", f"{prompt} c"]
    asked: list[tuple[list[str], Path]] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)

    def __call__(self, config: Any, run: RunDirectory, view: Any) -> Any:
        async def sample(prompts: Sequence[str], policy: Path, **_: Any) -> list[list[SimpleNamespace]]:
            self.asked.append((list(prompts), policy))
            return [[SimpleNamespace(text=text) for text in self.texts(prompt)] for prompt in prompts]

        async def close() -> None: ...

        shown = SimpleNamespace(stage=view.stage, step=view.step, note=self.notes.append)
        return SimpleNamespace(config=config, run=run, view=shown, connect=lambda: "", sample=sample, close=close)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Engine:
    made = Engine()
    monkeypatch.setattr(labelling, "Session", made)
    return made


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def pairs(run: RunDirectory, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[dict[str, Any]]]:
    """`pairs(num)` prepares the page without serving it and returns the candidate pairs."""
    monkeypatch.setattr(labelling, "serve_app", lambda app, config: None)

    def label(num_pairs: int = 5) -> list[dict[str, Any]]:
        options = {"annotators_per_pair": 1.1, "random_share": 0.2}
        labelling.collect_feedback(run, host="127.0.0.1", port=free_port(), num_pairs=num_pairs, **options)
        with closing(sqlite3.connect(run.path / FEEDBACK)) as connection:
            connection.row_factory = sqlite3.Row
            return [dict(row) for row in connection.execute("SELECT * FROM pairs ORDER BY position")]

    return label


def test_the_newest_policy_is_ppos_result_checkpoint_or_start(run: RunDirectory) -> None:
    config = read_run_config(run.path / "config.toml")
    assert newest_policy(config, run) == (0, Path("model"))
    policy(run.path / "sft")
    assert newest_policy(config, run) == (0, run.path / "sft")
    policy(run.path / "checkpoints" / "ppo" / "step-000002" / "policy")
    assert newest_policy(config, run) == (2, run.path / "checkpoints" / "ppo" / "step-000002" / "policy")
    policy(run.path / "checkpoints" / "ppo" / "step-000004" / "policy")
    policy(run.path / "policy")
    assert newest_policy(config, run) == (4, run.path / "policy")


def test_label_fails_if_the_run_has_no_policy(run: RunDirectory) -> None:
    shutil.rmtree("model")
    with pytest.raises(InputError, match="has no policy yet"):
        newest_policy(read_run_config(run.path / "config.toml"), run)


def test_a_pair_is_two_different_responses_with_columns_and_version(
    pairs: Callable[..., list[dict[str, Any]]], engine: Engine
) -> None:
    rows = pairs(5)
    version = rows[0]["policy_version"]
    assert version.startswith("0@")
    assert [row["id"] for row in rows] == [f"0-{version}-{i}" for i in range(5)]
    assert len({row["prompt"] for row in rows}) == 5
    for row in rows:
        assert (row["first"], row["second"]) == (f"{row['prompt']} a", f"{row['prompt']} b")
        assert json.loads(row["columns"]) == {"answer": int(row["prompt"].removeprefix("prompt "))}
    assert engine.asked == [([row["prompt"] for row in rows], Path("model"))]


def test_only_missing_pairs_are_sampled_if_the_command_is_repeated(
    pairs: Callable[..., list[dict[str, Any]]], engine: Engine
) -> None:
    first = pairs(5)
    assert pairs(5) == pairs(3) == first
    assert len(engine.asked) == 1
    more = pairs(8)
    assert (more[:5], len(more), len(engine.asked[1][0])) == (first, 8, 3)


def test_a_new_policy_gets_separate_pairs(pairs: Callable[..., list[dict[str, Any]]], run: RunDirectory) -> None:
    first = pairs(5)
    policy(run.path / "checkpoints" / "ppo" / "step-000002" / "policy")
    rows = pairs(5)
    assert rows[:5] == first
    assert {row["policy_version"].partition("@")[0] for row in rows[5:]} == {"2"}
    assert [row["prompt"] for row in rows[5:]] != [row["prompt"] for row in first]


def test_prompts_are_left_out_if_all_responses_are_equal(
    pairs: Callable[..., list[dict[str, Any]]], engine: Engine
) -> None:
    engine.texts = lambda prompt: ["same"] * 4 if prompt.endswith("0") else ["a", "b", "a", "b"]
    rows = pairs(50)
    assert (len(rows), [row for row in rows if row["prompt"].endswith("0")]) == (45, [])
    assert engine.notes == ["5 prompts left out: their responses are equal or too long to show"]


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Folders of the fake reward models used; each scores the last letter and fails for `d`."""
    folders: list[Path] = []

    class Scorer:
        def __init__(self, folder: Path) -> None:
            folders.append(folder)

        async def score(self, requests: Sequence[ScoreRequest]) -> list[Score | RewardError]:
            return [
                RewardError("reward_model", "too long")
                if request.response.endswith("d")
                else Score(request.id, len(folders) * 1000.0 + ord(request.response[-1]), {}, "v")
                for request in requests
            ]

    fake = types.ModuleType("reward_service.scorers.reward_model")
    fake.RewardModelScorer = Scorer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "reward_service.scorers.reward_model", fake)
    return folders


def rewards_of(rows: Sequence[dict[str, Any]]) -> dict[str, tuple[float | None, float | None]]:
    return {row["prompt"]: (row["first_reward"], row["second_reward"]) for row in rows}


def test_the_runs_reward_model_scores_each_response(
    pairs: Callable[..., list[dict[str, Any]]], run: RunDirectory, engine: Engine, judged: list[Path]
) -> None:
    policy(run.path / "reward_model")
    engine.texts = lambda prompt: [f"{prompt} a", f"{prompt} {'d' if prompt == 'prompt 7' else 'b'}"]
    rewards = rewards_of(pairs(50))
    assert rewards.pop("prompt 7") == (1097.0, None)
    assert set(rewards.values()) == {(1097.0, 1098.0)}


def test_a_new_reward_model_scores_the_existing_pairs_once(
    pairs: Callable[..., list[dict[str, Any]]], run: RunDirectory, engine: Engine, judged: list[Path]
) -> None:
    assert set(rewards_of(pairs(5)).values()) == {(None, None)}
    policy(run.path / "reward_model")
    first = pairs(5)
    assert set(rewards_of(first).values()) == {(1097.0, 1098.0)}
    (run.path / "reward_model" / "model.safetensors").unlink()
    (run.path / "reward_model" / "model.safetensors").write_text("a new one")
    second = pairs(5)
    assert set(rewards_of(second).values()) == {(2097.0, 2098.0)}
    assert pairs(5) == second
    versions = [f"reward_model@{folder.name}" for folder in judged]
    assert [{row["scorer_version"] for row in rows} for rows in (first, second)] == [{version} for version in versions]
    assert len(engine.asked) == 1


def test_the_reward_service_shows_pairs_of_the_newest_policy(run: RunDirectory) -> None:
    config = read_run_config(run.path / "config.toml")
    assert feedback_settings(config, run).policy_version is None
    (run.path / FEEDBACK).touch()
    settings = feedback_settings(config, run)
    assert (settings.seed, settings.policy_version) == (config.run.seed, newest_policy(config, run).version())
    policy(run.path / "sft")
    assert feedback_settings(config, run).policy_version != settings.policy_version
    for folder in ("model", run.path / "sft"):
        shutil.rmtree(folder)
    assert feedback_settings(config, run).policy_version is None


def test_label_fails_if_another_process_uses_the_run(
    pairs: Callable[..., list[dict[str, Any]]], run: RunDirectory, engine: Engine
) -> None:
    holder = RunDirectory(run.path)
    holder.lock()
    with pytest.raises(InputError, match="another process is using this run"):
        pairs(5)
    holder.close()
    assert engine.asked == []
    assert len(pairs(5)) == 5


def test_feedback_is_kept_with_fresh(pairs: Callable[..., list[dict[str, Any]]], run: RunDirectory) -> None:
    rows = pairs(2)
    config = read_run_config(run.path / "config.toml")
    (run.path / "summary.json").write_text("{}")
    with open_run(config, run.path, fresh=True):
        assert not (run.path / "summary.json").exists()
    assert pairs(2) == rows


def test_preferences_are_exported_in_trls_columns(run: RunDirectory, tmp_path: Path) -> None:
    store, file = FeedbackStore(run.path / FEEDBACK), tmp_path / "preferences.parquet"
    texts = {"prompt": "p", "first": "a", "second": "b"}
    choices: list[tuple[str, Literal["second", "tie"]]] = [("x", "second"), ("y", "tie")]
    for id, choice in choices:
        asyncio.run(store.add(Preference(kind="preference", id=id, annotator="Ann", choice=choice, **texts)))
    store.close()
    done = CliRunner().invoke(app, ["label", str(run.path), "--export", str(file)])
    assert (done.exit_code, done.stdout) == (0, f"{file}: 1 preferences (1 ties and 0 skips left out)\n")
    (row,) = pq.read_table(file).select(["prompt", "chosen", "rejected"]).to_pylist()
    assert row == {"prompt": "p", "chosen": "b", "rejected": "a"}


@pytest.mark.process
def test_label_serves_with_its_token_until_interrupted(
    pairs: Callable[..., list[dict[str, Any]]], run: RunDirectory
) -> None:
    pairs(2)
    port = free_port()
    command = [sys.executable, "-m", "deploy.cli", "label", str(run.path), "--port", str(port), "--num-pairs", "2"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "ANTIPHON_TOKEN": "secret"}
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout
        assert process.stdout.readline() == f"listening on http://127.0.0.1:{port}/label\n"
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as http:
            assert http.get("/label").status_code == 401
            http.headers["Authorization"] = "Bearer secret"
            assert "Which response is better?" in http.get("/label").text
            asked = http.get("/v1/pairs/next", params={"annotator": "Ann"}).json()
            assert asked["progress"] == {"num_done": 0, "num_left": 2}
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
        assert process.returncode == 0, errors
    finally:
        process.kill()
        process.communicate()
