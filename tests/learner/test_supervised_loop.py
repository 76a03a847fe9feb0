"""Both supervised stages: interrupted ones end with the same bytes, and held-out measurements choose and stop."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from cluster.errors import InputError
from learner.config import RewardModelConfig, SftConfig
from learner.reward_model_training import train_reward_model
from learner.sft import train_sft
from learner.supervised_checkpoint import Checkpoints
from learner.supervised_loop import BatchLoss, Plan, descend
from tests.chat import write_chat_model

Train = Callable[[Path, Path | None], Iterator[dict[str, float]]]
NUM_ROWS = 12
SFT = SftConfig(
    num_steps=11,
    batch_size=4,
    learning_rate=1e-2,
    held_out_share=0.2,
    evaluate_every_steps=2,
    patience=9,
    checkpoint_every_steps=4,
)
REWARD_MODEL = RewardModelConfig(
    num_epochs=4, batch_size=4, learning_rate=1e-2, patience=9, checkpoint_every_steps=4, held_out_share=0.2
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose dropout draws from torch's generator, and data for both stages."""
    path = tmp_path_factory.mktemp("loop")
    write_chat_model(path / "model", dropout=0.3)
    words = ["good", "bad", "fine", "dull", "new", "old"]
    rows = [
        {"prompt": f"the {words[i % 6]} film:", "completion": f"it is {words[i % 5]}.", "margin": i / 10}
        for i in range(NUM_ROWS)
    ]
    pairs = [{**row, "chosen": row["completion"], "rejected": f"no {i}"} for i, row in enumerate(rows)]
    pq.write_table(pa.Table.from_pylist(rows), path / "sft.parquet")
    pq.write_table(pa.Table.from_pylist(pairs), path / "preferences.parquet")
    return path


@pytest.fixture(params=["sft", "reward_model"])
def train(request: pytest.FixtureRequest, folder: Path) -> Train:
    """`train(output, checkpoints)` of each stage."""
    if request.param == "sft":

        def sft(output: Path, checkpoints: Path | None) -> Iterator[dict[str, float]]:
            return train_sft(folder / "model", folder / "sft.parquet", output, SFT, checkpoints, seed=0)

        return sft

    def reward_model(output: Path, checkpoints: Path | None) -> Iterator[dict[str, float]]:
        data = folder / "preferences.parquet"
        return train_reward_model(folder / "model", data, output, REWARD_MODEL, checkpoints, seed=0)

    return reward_model


def untimed(rows: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{key: value for key, value in row.items() if not key.endswith("_per_s")} for row in rows]


def weights(path: Path) -> bytes:
    return (path / "model.safetensors").read_bytes()


def interrupted_after(training: Iterator[dict[str, float]], step: int) -> None:
    """Let it run until it has yielded that step, and end it there."""
    while next(training).get("step") != step:
        pass
    training.close()  # type: ignore[attr-defined]


def streamed(training: Iterator[dict[str, float]]) -> list[dict[str, float]]:
    """All it yields, asked for as Ray asks: by sending something."""
    rows = [next(training)]
    with contextlib.suppress(StopIteration):
        while True:
            rows.append(training.send(1))  # type: ignore[attr-defined]
    return rows


def test_an_interrupted_stage_ends_with_the_same_bytes_and_tells_the_same(train: Train, tmp_path: Path) -> None:
    whole = list(train(tmp_path / "whole", None))
    checkpoints = tmp_path / "checkpoints"
    for step in (3, 6, 10):
        interrupted_after(train(tmp_path / "again", checkpoints), step)
    assert [path.name for path in checkpoints.iterdir()] == ["step-000008"]
    torch.manual_seed(99)
    counts, *rest = streamed(train(tmp_path / "again", checkpoints))
    assert weights(tmp_path / "again") == weights(tmp_path / "whole")
    assert rest[0]["step"] == 5, "the rows since the checkpoint before are told again"
    assert untimed([counts, *rest]) == untimed([whole[0], *whole[5:]])
    assert not checkpoints.exists()


def test_a_checkpoint_is_safetensors_and_json_alone(train: Train, tmp_path: Path) -> None:
    interrupted_after(train(tmp_path / "out", tmp_path / "checkpoints"), 6)
    (checkpoint,) = (tmp_path / "checkpoints").iterdir()
    names = ["best.safetensors", "model.safetensors", "progress.json", "state.safetensors"]
    assert sorted(path.name for path in checkpoint.iterdir()) == names
    for name in names:
        if name.endswith(".safetensors"):
            assert load_file(checkpoint / name)
    assert json.loads((checkpoint / "progress.json").read_text())["progress"]["step"] == 4


def test_a_checkpoint_of_other_data_is_refused_by_name(folder: Path, tmp_path: Path) -> None:
    checkpoints = tmp_path / "checkpoints"
    first = partial(train_sft, folder / "model", folder / "sft.parquet", tmp_path / "out", SFT, checkpoints)
    interrupted_after(first(seed=0), 5)
    with pytest.raises(InputError, match=r"step-000004: made of other data or settings"):
        list(first(seed=1))
    (checkpoints / "step-000004" / "progress.json").write_text("{}")
    with pytest.raises(InputError, match=r"step-000004/progress.json: no checkpoint"):
        list(first(seed=0))


def test_rows_tell_the_held_out_loss_where_it_is_measured(train: Train, tmp_path: Path) -> None:
    _, *rows, last = train(tmp_path / "out", None)
    measured = {row["step"]: row["held_out_loss"] for row in rows if "held_out_loss" in row}
    steps = [2, 4, 6, 8, 10, 11] if len(rows) == 11 else [3, 6, 9, 12]
    assert list(measured) == steps
    assert last["held_out_loss"] == min(measured.values()) == measured[last["best_step"]]


class Scripted:
    """A model of one weight that moves by 1 a step, and held-out losses told in advance."""

    def __init__(self, losses: list[float], **plan: Any) -> None:
        self.model = nn.Linear(1, 1, bias=False)
        self.model.load_state_dict({"weight": torch.zeros(1, 1)})
        self.seen: list[float] = []
        self._losses = iter(losses)
        settings = {"evaluate_every_steps": 1, "keeps_best": True, "patience": None} | plan
        self._plan = Plan(num_steps=6, learning_rate=1.0, checkpoint_every_steps=1, unit="rows", **settings)

    def run(self, checkpoints: Checkpoints | None = None) -> Iterator[dict[str, float]]:
        batches = ([number] for number in count())
        self.kept = yield from descend(self.model, batches, self._loss, self._evaluate, self._plan, checkpoints)

    def _loss(self, batch: list[int]) -> BatchLoss:
        return BatchLoss(self.model.weight.sum(), {}, 1)

    def _evaluate(self) -> dict[str, float]:
        assert not self.model.training
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
    checkpoints = Checkpoints(tmp_path / "checkpoints", "this")
    interrupted_after(Scripted(LOSSES, patience=3).run(checkpoints), 4)
    again = Scripted(LOSSES[3:], patience=3)
    assert [row["step"] for row in again.run(checkpoints)] == [3, 4, 5]
    assert again.kept["step"] == whole.kept["step"] == 2
    assert again.model.weight.item() == whole.model.weight.item() == whole.seen[1]


def test_the_last_weights_are_kept_where_the_plan_says_so() -> None:
    scripted = Scripted(LOSSES[::-1], keeps_best=False)
    list(scripted.run())
    assert (scripted.kept["step"], scripted.kept["held_out_loss"]) == (6, 3.0)
    assert scripted.model.weight.item() == scripted.seen[-1]


def test_held_out_examples_are_not_trained_on(folder: Path, tmp_path: Path) -> None:
    counts, *_ = train_sft(folder / "model", folder / "sft.parquet", tmp_path / "out", SFT, seed=0)
    assert (counts["num_examples"], counts["num_held_out"]) == (NUM_ROWS, 2)


def test_patience_without_held_out_examples_is_refused() -> None:
    with pytest.raises(ValueError, match="patience needs a held_out_share to watch"):
        SftConfig(patience=2)
