"""Training a reward model again: its data, how it replaces the old version, and a kill at any point."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
import types
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.data.datasets import Source
from cluster.errors import InputError
from deploy.config.load import load_run_config
from deploy.config.schema import RunConfig
from deploy.run.directory import RunDirectory
from deploy.run.layout import NEXT, TRAINING
from deploy.run.open import open_run
from deploy.run.reward_models import entry_of, publish, published_folder, settle
from deploy.run.stages import require_stages
from deploy.runtime.session import Session
from deploy.stages import reward_model
from deploy.stages.supervised import Supervised
from deploy.terminal.view import View
from reward_service.scorers.files import weights_digest

RUN = """
[run]
name = "run"
runs_dir = "."
stages = ["preferences", "reward_model", "ppo"]
[model]
path = "model"
[data]
prompts = "prompts.jsonl"
[preferences]
annotator = "task:judge"
"""
FEEDBACK = pa.table(
    {
        "prompt": ["p", "p", "q"],
        "chosen": ["a", "b", "c"],
        "rejected": ["b", "a", "d"],
        "annotator": ["Ann", "Bob", "Ann"],
    }
)


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    monkeypatch.chdir(tmp_path)
    Path("run.toml").write_text(RUN)
    return load_run_config(Path("run.toml"))


@pytest.fixture
def run(config: RunConfig, tmp_path: Path) -> RunDirectory:
    with open_run(config, tmp_path / "run") as opened:
        pq.write_table(
            pa.table({"prompt": ["x"], "chosen": ["y"], "rejected": ["z"]}), opened.path / "preferences.parquet"
        )
    return opened


def write_model(folder: Path, weights: str, *, chosen: float = 1.0, data: list[str] | None = None, **more: Any) -> None:
    """Write the files of a trained reward model that a run reads."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_text(weights)
    pq.write_table(pa.table({"chosen": [chosen, 1.0], "rejected": [0.0, 0.0]}), folder / "held_out_rewards.parquet")
    names = ("accuracy", "held_out_accuracy", "held_out_loss", "ece", "nll", "margin_mean", "best_step")
    record = dict.fromkeys(names, 0.5) | {"num_cut": 0, "num_dropped": 0, "num_held_out": 1, "num_examples": 8}
    record |= {"data": data or ["preferences.parquet"], "settings": {"label_smoothing": 0.0}} | more
    (folder / "training.json").write_text(json.dumps(record))


def weights_of(folder: Path) -> str:
    return (folder / "model.safetensors").read_text()


def kept(run: RunDirectory) -> list[str]:
    """Return the weights of all archived versions."""
    return sorted(weights_of(path) for path in (run.path / "reward_models").iterdir())


class FakeSession:
    """The part of a session that the stage uses."""

    def __init__(self, config: RunConfig, run: RunDirectory) -> None:
        self.config, self.run = config, run
        self.notes: list[str] = []
        self.view = SimpleNamespace(note=self.notes.append, stage=lambda *_: None)


def session_of(config: RunConfig, run: RunDirectory) -> Session:
    return cast(Session, FakeSession(config, run))


class Trainings:
    """Starts learner groups that train in no time; `tasks` lists what was trained."""

    def __init__(self) -> None:
        self.tasks: list[Supervised] = []

    async def start(self, session: Any, task: Supervised) -> Trainings:
        self.tasks.append(task)
        data = [path.name for path in (*(source.path for source in task.data), task.more) if path]
        num_more = pq.read_metadata(task.more).num_rows if task.more else 0
        weights = f"weights {len(self.tasks)}"
        write_model(task.output, weights, chosen=float(task.member), data=data, num_more=num_more)
        return self

    async def train(self) -> AsyncIterator[dict[str, float]]:
        no_metrics: tuple[dict[str, float], ...] = ()
        for metrics in no_metrics:
            yield metrics

    async def shutdown(self) -> None: ...


@pytest.fixture
def trained() -> Trainings:
    return Trainings()


class Agreeing:
    """A feedback store whose annotators agree on three of four pairs."""

    def __init__(self, path: Path) -> None:
        assert path.name == "feedback.sqlite"

    async def summary(self) -> types.SimpleNamespace:
        return types.SimpleNamespace(mean_agreement=types.SimpleNamespace(raw=0.75, kappa=0.5))

    def close(self) -> None: ...


@pytest.fixture
def answer(monkeypatch: pytest.MonkeyPatch, run: RunDirectory) -> Callable[[pa.Table], None]:
    """`answer(table)` stores answers of annotators."""

    def put(table: pa.Table) -> None:
        module = types.ModuleType("reward_service.feedback.store")
        module.read_preferences = lambda path: table  # type: ignore[attr-defined]
        module.FeedbackStore = Agreeing  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "reward_service.feedback.store", module)
        (run.path / "feedback.sqlite").touch()

    return put


async def test_answers_are_trained_on_beside_the_runs_own_pairs(
    config: RunConfig, run: RunDirectory, trained: Trainings, answer: Callable[[pa.Table], None]
) -> None:
    answer(FEEDBACK)
    reward_model.begin(run, config)
    feedback = pq.read_table(run.path / TRAINING / "feedback.parquet")
    assert feedback.equals(FEEDBACK.select(["prompt", "chosen", "rejected"]))
    await reward_model.train_again(session_of(config, run), start=trained.start)
    (task,) = trained.tasks
    assert (task.data, task.more, task.by_prompt) == (
        [Source(run.path / "preferences.parquet")],
        run.path / TRAINING / "feedback.parquet",
        True,
    )
    summary = run.summary()["reward_model"]
    assert (summary["num_pairs"], summary["num_pairs_by_source"]) == (8, {"stage": 5, "feedback": 3})
    assert summary["agreement"] == {"raw": 0.75, "kappa": 0.5}
    assert summary["versions"] == [entry_of(run.path / "reward_model")]
    assert summary["version"] == f"reward_model@{weights_digest(run.path / 'reward_model')}"
    assert not (run.path / TRAINING).exists()


async def test_the_runs_own_pairs_are_held_out_by_prompt_without_answers(
    config: RunConfig, run: RunDirectory, trained: Trainings, answer: Callable[[pa.Table], None]
) -> None:
    answer(FEEDBACK.slice(0, 0))
    reward_model.begin(run, config)
    await reward_model.train_again(session_of(config, run), start=trained.start)
    assert [(task.data[0].path.name, task.more, task.by_prompt) for task in trained.tasks] == [
        ("preferences.parquet", None, True)
    ]
    assert run.summary()["reward_model"]["num_pairs_by_source"] == {"stage": 8, "feedback": 0}


async def test_answers_are_enough_without_the_runs_own_pairs(
    config: RunConfig, run: RunDirectory, trained: Trainings, answer: Callable[[pa.Table], None]
) -> None:
    (run.path / "preferences.parquet").unlink()
    with pytest.raises(InputError, match="preferences: not done"):
        require_stages(config, run, ["reward_model"])
    answer(FEEDBACK)
    require_stages(config, run, ["reward_model"], have=["preferences"])
    reward_model.begin(run, config)
    await reward_model.train_again(session_of(config, run), start=trained.start)
    assert [(task.data[0].path.name, task.more) for task in trained.tasks] == [("feedback.parquet", None)]
    assert run.summary()["reward_model"]["num_pairs_by_source"] == {"stage": 0, "feedback": 8}


async def test_the_first_training_publishes_a_version_too(
    config: RunConfig, run: RunDirectory, trained: Trainings
) -> None:
    session: Any = FakeSession(config, run)
    await reward_model.train_reward_model(session, start=trained.start)
    assert [(task.more, task.by_prompt, task.fresh) for task in trained.tasks] == [(None, False, None)]
    assert weights_of(run.path / "reward_model") == "weights 1"
    assert "uncertainty" not in run.summary()["reward_model"]
    assert "reward model: 50.0% of fresh labels predicted" in session.notes
    assert kept(run) == ["weights 1"]


async def test_members_are_kept_together_and_report_their_uncertainty(run: RunDirectory, trained: Trainings) -> None:
    config = load_run_config(Path("run.toml"), ["reward_model.num_members = 3", "run.seed = 4"])
    session: Any = FakeSession(config, run)
    await reward_model.train_reward_model(session, start=trained.start)
    folder = run.path / "reward_model"
    weights = [weights_of(path) for path in (folder, folder / "member-1", folder / "member-2")]
    assert weights == ["weights 1", "weights 2", "weights 3"]
    assert [task.name for task in trained.tasks] == ["reward_model", "reward_model/member-1", "reward_model/member-2"]
    assert session.notes[:3] == [f"reward model: member {k}, seed {4 + k}" for k in range(3)]
    summary = run.summary()["reward_model"]
    spread = (2 / 3) ** 0.5  # of 0, 1 and 2; the second pair's margins are all 1
    assert (summary["num_members"], summary["uncertainty"]) == (3, pytest.approx(spread / 2))


async def test_finished_members_are_not_trained_again(run: RunDirectory, trained: Trainings) -> None:
    config = load_run_config(Path("run.toml"), ["reward_model.num_members = 2"])
    write_model(run.path / TRAINING / "reward_model", "done before")
    await reward_model.train_reward_model(session_of(config, run), start=trained.start)
    assert [task.member for task in trained.tasks] == [1]
    assert weights_of(run.path / "reward_model") == "done before"


@pytest.mark.parametrize(
    ("answers", "smoothing", "is_resumed"),
    [(FEEDBACK, 0.0, True), (FEEDBACK.slice(1), 0.0, False), (FEEDBACK.slice(3), 0.0, False), (FEEDBACK, 0.1, False)],
    ids=["the same", "other answers", "no answers", "other settings"],
)
def test_a_training_is_resumed_only_with_the_same_data_and_settings(
    run: RunDirectory, answer: Callable[[pa.Table], None], answers: pa.Table, smoothing: float, is_resumed: bool
) -> None:
    answer(FEEDBACK)
    reward_model.begin(run, load_run_config(Path("run.toml")))
    left, checkpoint = run.path / TRAINING / "reward_model", run.path / "checkpoints" / "reward_model" / "step-000002"
    for folder in (left, checkpoint):
        folder.mkdir(parents=True)
    stages = ["ppo", "reward_model", "reward_model/member-1"]
    rows = [json.dumps({"stage": stage, "step": 1}) + "\n" for stage in stages]
    (run.path / "metrics.jsonl").write_text("".join(rows))
    answer(answers)
    reward_model.begin(run, load_run_config(Path("run.toml"), [f"reward_model.label_smoothing = {smoothing}"]))
    assert (left.exists(), checkpoint.exists()) == (is_resumed, is_resumed)
    assert [row["stage"] for row in run.metrics()] == (stages if is_resumed else ["ppo"])


def test_retraining_runs_in_the_locked_run_with_its_own_settings(run: RunDirectory) -> None:
    launched = []

    def launch(config: RunConfig, opened: RunDirectory, stage: str, function: Any, view: View) -> None:
        assert function is reward_model.train_again
        launched.append((opened.path, stage, config.reward_model.label_smoothing, opened.status().state))
        with pytest.raises(InputError, match="another process"), open_run(config, opened.path):
            pass

    changed = load_run_config(Path("run.toml"), ["reward_model.label_smoothing = 0.1"])
    assert reward_model.retrain(changed, run.path, View(), launch=launch) == []
    assert launched == [(run.path, "reward_model", 0.1, "RUNNING")]
    assert run.status().state == "DONE"


def test_retraining_refuses_other_changed_settings_and_missing_pairs(run: RunDirectory) -> None:
    with pytest.raises(InputError, match=r"learner\.clip"):
        reward_model.retrain(load_run_config(Path("run.toml"), ["learner.clip = 0.1"]), run.path, View())
    (run.path / "preferences.parquet").unlink()
    with pytest.raises(InputError, match="preferences: not done"):
        reward_model.retrain(load_run_config(Path("run.toml")), run.path, View())


def test_checkpoints_of_an_unfinished_training_are_kept(config: RunConfig, run: RunDirectory) -> None:
    write_model(run.path / "reward_model", "old")
    checkpoint = run.path / "checkpoints" / "reward_model" / "step-000002"
    checkpoint.mkdir(parents=True)
    reward_model.begin(run, config)
    checkpoint.mkdir(parents=True)
    with open_run(config, run.path):
        assert checkpoint.exists()


async def test_a_first_training_refuses_to_resume_a_second_one(
    config: RunConfig, run: RunDirectory, trained: Trainings
) -> None:
    reward_model.begin(run, config)
    with pytest.raises(InputError, match="its training was interrupted"):
        await reward_model.train_reward_model(session_of(config, run), start=trained.start)


def test_a_new_version_replaces_the_old_one_which_is_archived(run: RunDirectory) -> None:
    write_model(run.path / TRAINING / "reward_model", "first")
    first = publish(run)
    run.update_summary({"held_out.objective": 3.0, "reward_model.noise_ceiling": 0.9})
    write_model(run.path / TRAINING / "reward_model", "second", num_broken=2)
    second = publish(run)
    digest = first["version"].removeprefix("reward_model@")
    assert weights_of(run.path / "reward_model") == "second"
    assert weights_of(run.path / "reward_models" / digest) == "first"
    assert kept(run) == ["first", "second"]
    summary = run.summary()
    assert summary["reward_model"]["versions"] == [first, second]
    assert (summary["reward_model"]["num_broken"], summary["reward_model"]["noise_ceiling"]) == (2, 0.9)
    assert "held_out" not in summary, "what was best by the old rewards is not by the new ones"


class Killed(BaseException):
    pass


@pytest.mark.parametrize("num_done", range(9))
def test_a_kill_at_any_point_leaves_a_complete_reward_model(
    config: RunConfig, run: RunDirectory, monkeypatch: pytest.MonkeyPatch, num_done: int
) -> None:
    write_model(run.path / "reward_model", "old")
    write_model(run.path / TRAINING / "reward_model", "new")
    calls: list[tuple[Any, ...]] = []

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if len(calls) == num_done:
                raise Killed
            calls.append(args)
            return function(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", counted(Path.rename))
        patch.setattr("deploy.run.reward_models.shutil.rmtree", counted(shutil.rmtree))
        patch.setattr("deploy.run.reward_models.os.link", counted(os.link))
        with pytest.raises(Killed):
            publish(run)
    require_stages(config, run, ["ppo"])
    with open_run(config, run.path):
        pass
    expected = "old" if num_done == 0 else "new"
    assert weights_of(run.path / "reward_model") == expected
    assert not (run.path / NEXT).exists()
    versions = run.summary().get("reward_model", {}).get("versions", [])
    assert len(versions) == (0 if num_done == 0 else 1)
    folder = published_folder(run.path)
    assert folder is not None
    assert weights_of(folder) == expected
    assert kept(run) == (["old"] if num_done == 0 else ["new", "old"])


def test_an_archived_version_is_linked_and_never_changes(run: RunDirectory) -> None:
    write_model(run.path / "reward_model", "old", data=["preferences.parquet"])
    (run.path / "reward_model" / "member-1").mkdir()
    (run.path / "reward_model" / "member-1" / "model.safetensors").write_text("second member")
    folder = published_folder(run.path)
    assert folder == run.path / "reward_models" / weights_digest(run.path / "reward_model")
    assert (folder / "model.safetensors").samefile(run.path / "reward_model" / "model.safetensors")
    write_model(run.path / TRAINING / "reward_model", "new")
    publish(run)
    assert weights_of(folder) == "old"
    assert weights_of(folder / "member-1") == "second member"
    assert published_folder(run.path) != folder


def test_a_version_is_copied_if_it_cannot_be_linked(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr("deploy.run.reward_models.os.link", refused)
    write_model(run.path / "reward_model", "old")
    folder = published_folder(run.path)
    assert folder is not None
    assert weights_of(folder) == "old"
    assert not (folder / "model.safetensors").samefile(run.path / "reward_model" / "model.safetensors")


def test_nothing_is_published_without_a_reward_model(run: RunDirectory) -> None:
    assert published_folder(run.path) is None
    assert not (run.path / "reward_models").exists()


def test_the_same_weights_are_no_new_version(run: RunDirectory) -> None:
    for _ in range(3):
        write_model(run.path / TRAINING / "reward_model", "same")
        publish(run)
    assert len(run.summary()["reward_model"]["versions"]) == 1
    assert kept(run) == ["same"]
    settle(run)
    assert weights_of(run.path / "reward_model") == "same"
    assert sorted(path.name for path in run.path.iterdir() if path.name.startswith(".reward_model.")) == []
