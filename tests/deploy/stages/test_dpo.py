"""The DPO stage: what it trains on, from which policy, and what it reports. No learner runs."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.data.datasets import Source
from cluster.errors import InputError
from deploy.config.load import load_run_config
from deploy.run.artifacts import policy_path
from deploy.run.directory import RunDirectory
from deploy.run.open import open_run
from deploy.run.stages import require_stages
from deploy.stages import supervised
from deploy.stages.dpo import run_dpo
from deploy.stages.supervised import Supervised

RUN = """
[run]
stages = ["sft", "dpo", "ppo"]
[model]
path = "model"
[data]
sft = "sft.jsonl"
prompts = "prompts.jsonl"
preferences = "pairs.jsonl"
[reward_service]
scorer = "tests.support.scorers:length"
"""
FEEDBACK = pa.table({"prompt": ["p", "q"], "chosen": ["a", "b"], "rejected": ["b", "a"], "annotator": ["Ann", "Bob"]})
COUNTS = {"num_examples": 9.0, "num_cut": 0.0, "num_dropped": 0.0, "num_steps": 2.0, "learning_rate": 1e-3}


class Learners:
    """A learner group that yields the given rows; `task` is what it trains."""

    task: Supervised

    def __init__(self, *rows: dict[str, float]) -> None:
        self._rows = rows

    async def start(self, session: Any, task: Supervised) -> Learners:
        self.task = task
        return self

    async def train(self) -> AsyncIterator[dict[str, float]]:
        for row in self._rows:
            yield row

    async def shutdown(self) -> None: ...


@pytest.fixture
def session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    Path("run.toml").write_text(RUN)
    Path("pairs.jsonl").write_text("{}\n")
    return session_of()


def session_of() -> Any:
    """Return the part of a session that the stage uses."""
    config, notes = load_run_config(Path("run.toml")), list[str]()
    with open_run(config, Path("run").absolute()) as run:
        view = SimpleNamespace(note=notes.append, stage=lambda *_: None, expect=lambda *_: None)
        return SimpleNamespace(config=config, run=run, notes=notes, view=view, log_step=lambda *_: None)


def answer(run: RunDirectory, table: pa.Table, monkeypatch: pytest.MonkeyPatch) -> None:
    """Store answers of annotators."""
    (run.path / "feedback.sqlite").touch()
    monkeypatch.setattr("reward_service.feedback.store.read_preferences", lambda path: table)


async def test_it_trains_the_sft_policy_on_the_preferences(session: Any) -> None:
    sft = session.run.path / "sft"
    sft.mkdir()
    learners = Learners(COUNTS, {"step": 1.0}, {"held_out_accuracy": 0.75, "held_out_loss": 0.5})
    await run_dpo(session, start=learners.start)
    output = session.run.path / "dpo"
    assert learners.task == Supervised("dpo", "dpo", model=sft, data=[Source(Path("pairs.jsonl"))], output=output)
    assert session.run.summary()["dpo"] == {**COUNTS, "held_out_accuracy": 0.75, "held_out_loss": 0.5}
    assert session.notes[-1] == "dpo: prefers the better response on 75.0% of held-out rows, held-out loss 0.5000"


async def test_ppo_starts_from_it_and_without_sft_it_starts_from_the_model(session: Any) -> None:
    learners = Learners(COUNTS)
    await run_dpo(session, start=learners.start)
    assert learners.task.model == Path("model")
    (session.run.path / "dpo").mkdir()
    assert policy_path(session.config, session.run.path) == session.run.path / "dpo"


async def test_human_feedback_is_trained_on_beside_the_preferences(
    session: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer(session.run, FEEDBACK, monkeypatch)
    learners = Learners(COUNTS)
    await run_dpo(session, start=learners.start)
    assert learners.task.more is not None
    assert pq.read_table(learners.task.more).equals(FEEDBACK.select(["prompt", "chosen", "rejected"]))
    assert learners.task.data == [Source(Path("pairs.jsonl"))]


async def test_a_resumed_stage_trains_on_the_answers_that_it_began_with(
    session: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer(session.run, FEEDBACK.slice(1), monkeypatch)
    await run_dpo(session, start=Learners(COUNTS).start)
    answer(session.run, FEEDBACK, monkeypatch)
    learners = Learners(COUNTS)
    await run_dpo(session, start=learners.start)
    assert learners.task.more is not None
    assert pq.read_table(learners.task.more).num_rows == 1


async def test_answers_given_after_a_checkpoint_are_left_to_the_next_stage(
    session: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (session.run.path / "checkpoints" / "dpo" / "step-000004").mkdir(parents=True)
    answer(session.run, FEEDBACK, monkeypatch)
    session.run.metrics = list
    learners = Learners(COUNTS)
    await run_dpo(session, start=learners.start)
    assert learners.task.more is None


async def test_answers_are_enough_without_preferences(session: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("pairs.jsonl").unlink()
    with pytest.raises(InputError, match=r"no preferences: set data\.preferences, or label pairs"):
        await run_dpo(session, start=Learners(COUNTS).start)
    answer(session.run, FEEDBACK.slice(0, 0), monkeypatch)
    with pytest.raises(InputError, match="no preferences"):
        await run_dpo(session, start=Learners(COUNTS).start)
    answer(session.run, FEEDBACK, monkeypatch)
    learners = Learners(COUNTS)
    await run_dpo(session, start=learners.start)
    assert (len(learners.task.data), learners.task.more) == (1, None)
    assert pq.read_table(learners.task.data[0].path).num_rows == 2


async def test_it_refuses_a_run_whose_ppo_began_from_another_policy(session: Any) -> None:
    (session.run.path / "checkpoints" / "ppo" / "step-000001").mkdir(parents=True)
    with pytest.raises(InputError, match="PPO of this run began from another policy"):
        await run_dpo(session, start=Learners(COUNTS).start)


async def test_the_references_progress_is_noted_and_not_recorded(session: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    progress = [{"num_reference": float(done), "num_rows": 9.0} for done in (3, 6, 9)]
    await run_dpo(session, start=Learners(COUNTS, *progress).start)
    lines = [f"dpo: reference log-probabilities of {done} of 9 rows" for done in (3, 9)]
    assert session.notes == ["dpo: 2 steps, learning rate 1.0e-03, by the model's size (dpo.learning_rate)", *lines]
    assert "num_reference" not in session.run.summary()["dpo"]
    monkeypatch.setattr(supervised, "REFERENCE_EVERY_S", 0.0)
    session.notes.clear()
    await run_dpo(session, start=Learners(*progress).start)
    assert len(session.notes) == 3


def test_it_needs_preferences_of_a_stage_a_file_or_people(session: Any, tmp_path: Path) -> None:
    require_stages(session.config, None, ["dpo"], have=["sft"])
    text = RUN.replace('preferences = "pairs.jsonl"\n', "")
    Path("run.toml").write_text(text)
    config = load_run_config(Path("run.toml"))
    run = RunDirectory(tmp_path)
    for stages in (["dpo"], ["reward_model"]):
        with pytest.raises(InputError, match="preferences: not done"):
            require_stages(config, run, stages, have=["sft", "dpo"])
    (tmp_path / "feedback.sqlite").touch()
    require_stages(config, run, ["dpo"], have=["sft"])
