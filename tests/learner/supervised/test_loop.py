"""Interrupted stages end with the same weights.

Held-out measurements choose the weights and stop training.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cluster.errors import InputError, LearnerError
from learner import checkpoint
from learner.config import SftConfig
from learner.distributed.gradients import make_adamw
from learner.distributed.ranks import Ranks
from learner.learning_rates import Schedule
from learner.supervised.loop import Plan, Row, descend
from learner.supervised.optimizer import Optimizer
from learner.supervised.progress import Checkpoints
from learner.supervised.rank import SupervisedSettings
from tests.support.supervised_ranks import CPU, STAGES, interrupted_after, settings, stream, untimed, write_inputs

ONE = Ranks(CPU, distributed=False)
NUM_ROWS = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("loop"), NUM_ROWS)


def weights(rank_settings: SupervisedSettings) -> bytes:
    return (rank_settings.output_path / "model.safetensors").read_bytes()


@pytest.mark.parametrize("stage", STAGES)
def test_an_interrupted_stage_gives_the_same_weights_and_metrics(folder: Path, stage: str, tmp_path: Path) -> None:
    undisturbed = replace(settings(folder, stage, tmp_path / "whole"), checkpoints_path=None)
    whole = list(stream(undisturbed))
    rank_settings = settings(folder, stage, tmp_path / "again")
    assert rank_settings.checkpoints_path is not None
    for step in (2, 5, 7):
        interrupted_after(stream(rank_settings), step)
    assert [path.name for path in rank_settings.checkpoints_path.iterdir()] == ["step-000006"]
    torch.manual_seed(99)
    counts, *rest = stream(rank_settings)
    assert weights(rank_settings) == weights(undisturbed)
    assert rest[0]["step"] == 4, "the rows since the checkpoint before are repeated"
    assert untimed([counts, *rest]) == untimed([whole[0], *whole[4:]])
    assert not rank_settings.checkpoints_path.exists()


@pytest.mark.parametrize("stage", STAGES)
def test_a_checkpoint_is_safetensors_and_json_with_the_best_weights(folder: Path, stage: str, tmp_path: Path) -> None:
    rank_settings = settings(folder, stage, tmp_path)
    interrupted_after(stream(rank_settings), 5)
    assert rank_settings.checkpoints_path is not None
    (kept,) = rank_settings.checkpoints_path.iterdir()
    names = ["checkpoint.json", "progress.json", "state-00000-00000.safetensors"]
    assert sorted(path.name for path in kept.iterdir()) == names
    progress = json.loads((kept / "progress.json").read_text())["progress"]
    assert (progress["step"], [row["step"] for row in progress["rows"]]) == (3, [1, 2, 3])
    state = checkpoint.State(kept)
    assert {name.partition(".")[0] for name in state.names} >= {"best", "optimizer"}


def test_an_error_names_a_checkpoint_of_other_data(folder: Path, tmp_path: Path) -> None:
    rank_settings = settings(folder, "sft", tmp_path)
    interrupted_after(stream(rank_settings), 4)
    with pytest.raises(InputError, match=r"step-000003: was made from other data or settings"):
        list(stream(replace(rank_settings, place=replace(rank_settings.place, seed=1))))
    (tmp_path / "checkpoints" / "step-000003" / "progress.json").write_text("{}")
    with pytest.raises(InputError, match=r"step-000003/progress.json: no checkpoint"):
        list(stream(rank_settings))


@pytest.mark.parametrize("stage", STAGES)
def test_rows_have_the_held_out_loss_if_it_was_measured(folder: Path, stage: str, tmp_path: Path) -> None:
    _, *rows, last = stream(settings(folder, stage, tmp_path))
    measured = {row["step"]: row["held_out_loss"] for row in rows if "held_out_loss" in row}
    expected = {"sft": [2, 4, 6, 7], "reward_model": [3, 6, 9], "dpo": [3, 6, 9], "kto": [3, 6, 7]}
    assert list(measured) == expected[stage]
    assert last["held_out_loss"] == min(measured.values()) == measured[last["best_step"]]


SCHEDULE = Schedule("cosine", 0.1, 0.1)


class Scripted:
    """A model of one weight that changes by 1 per step, and rank_settings held-out losses."""

    def __init__(self, losses: list[float], **plan: Any) -> None:
        self.model = nn.Linear(1, 1, bias=False)
        self.model.load_state_dict({"weight": torch.zeros(1, 1)})
        self.seen: list[float] = []
        self.slope = 1.0
        self._losses = iter(losses)
        settings = {"evaluate_every_steps": 1, "keeps_best": True, "patience": None} | plan
        self._plan = Plan(
            num_steps=6, learning_rate=1.0, schedule=SCHEDULE, checkpoint_every_steps=1, unit="rows", **settings
        )

    def run(self, checkpoints: Checkpoints | None = None) -> Iterator[Row]:
        batches = ([number] for number in count())
        adamw = make_adamw(self.model.parameters())
        optimizer = Optimizer(self.model, adamw, ONE, learning_rate=1.0, schedule=SCHEDULE, num_steps=6)
        parts = (batches, self._accumulate, self._evaluate, self._plan, checkpoints)
        self.kept = yield from descend(self.model, optimizer, *parts)

    def _accumulate(self, batch: list[int]) -> Row:
        loss = self.slope * self.model.weight.sum()
        loss.backward()
        return {"loss": loss.item(), "num_rows": 1.0}

    def _evaluate(self) -> Row:
        self.seen.append(self.model.weight.item())
        return {"held_out_loss": next(self._losses)}


LOSSES = [3.0, 1.0, float("nan"), 2.0, 1.0, 0.5]


def test_the_weights_of_the_lowest_loss_are_kept() -> None:
    scripted = Scripted([3.0, 1.0, float("nan"), 2.0, 1.0, 4.0])
    assert len(list(scripted.run())) == 6
    assert (scripted.kept["step"], scripted.kept["held_out_loss"]) == (2, 1.0)
    assert scripted.model.weight.item() == scripted.seen[1] != scripted.seen[-1]


def test_training_stops_when_patience_ends_even_if_it_was_interrupted(tmp_path: Path) -> None:
    whole = Scripted(LOSSES, patience=3)
    assert [row["step"] for row in whole.run()] == [1, 2, 3, 4, 5]
    checkpoints = Checkpoints(tmp_path / "checkpoints", "this", ONE)
    interrupted_after(Scripted(LOSSES, patience=3).run(checkpoints), 4)
    again = Scripted(LOSSES[3:], patience=3)
    assert [row["step"] for row in again.run(checkpoints)] == [3, 4, 5]
    assert again.kept["step"] == whole.kept["step"] == 2
    assert again.model.weight.item() == whole.model.weight.item() == whole.seen[1]


def test_the_last_weights_are_kept_if_the_plan_says_so() -> None:
    scripted = Scripted(LOSSES[::-1], keeps_best=False)
    list(scripted.run())
    assert (scripted.kept["step"], scripted.kept["held_out_loss"]) == (6, 3.0)
    assert scripted.model.weight.item() == scripted.seen[-1]


def test_the_stage_fails_before_weights_change_if_a_gradient_is_nan() -> None:
    scripted = Scripted(LOSSES)
    steps = scripted.run()
    next(steps)
    scripted.slope = float("nan")
    with pytest.raises(LearnerError, match="step 2: the gradient is not finite"):
        next(steps)
    assert scripted.model.weight.item() == scripted.seen[0]


def test_held_out_examples_are_not_trained_on(folder: Path, tmp_path: Path) -> None:
    counts, *_ = stream(settings(folder, "sft", tmp_path))
    assert (counts["num_examples"], counts["num_held_out"]) == (NUM_ROWS, 2)


def test_patience_without_held_out_examples_is_refused() -> None:
    with pytest.raises(ValueError, match="patience: needs a held_out_share above 0"):
        SftConfig(patience=2)
