"""Trains supervised ranks without Ray: `python -m tests.support.supervised_ranks RANK SIZE FOLDER`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist

from cluster.data.datasets import Source
from learner.config import LearnerConfig, RewardModelConfig, SftConfig
from learner.distributed.gradients import make_adamw
from learner.distributed.ranks import Ranks
from learner.dpo_config import DpoConfig
from learner.place import Place
from learner.supervised.loop import Row
from learner.supervised.rank import SupervisedRank, SupervisedSettings, load_net, shard_net
from learner.supervised.stages import Stage
from tests.support.chat import write_chat_model

CPU = torch.device("cpu")
SFT = SftConfig(
    num_steps=7,
    batch_size=5,
    learning_rate=3e-4,
    held_out_share=0.2,
    evaluate_every_steps=2,
    patience=9,
    checkpoint_every_steps=3,
)
REWARD_MODEL = RewardModelConfig(
    num_epochs=3, batch_size=4, learning_rate=3e-4, patience=9, checkpoint_every_steps=3, held_out_share=0.2
)
DPO = DpoConfig(
    num_epochs=3, batch_size=4, learning_rate=3e-4, patience=9, checkpoint_every_steps=3, held_out_share=0.2
)
KTO = DpoConfig(
    loss="kto", num_steps=7, batch_size=7, learning_rate=3e-4, checkpoint_every_steps=3, held_out_share=0.2, patience=9
)
STAGES: dict[str, Stage] = {"sft": SFT, "reward_model": REWARD_MODEL, "dpo": DPO, "kto": KTO}
LAYOUTS: dict[str, dict[str, Any]] = {
    "packed": {},
    "padded pieces, float64": {
        "dtype": "float64",
        "packing": False,
        "micro_batch_tokens": 60,
        "activation_checkpointing": True,
    },
}


def write_inputs(folder: Path, num_rows: int = 12) -> Path:
    """Write a model, and data of many lengths for every stage."""
    write_chat_model(folder / "model")
    words = ["good", "bad", "fine and long", "dull", "new", "old and very much longer"]
    rows = [
        {"prompt": f"the {words[i % 6]} film:", "completion": f"it is {words[i % 5]}.", "margin": i / 10}
        for i in range(num_rows)
    ]
    pairs = [{**row, "chosen": row["completion"], "rejected": f"no {i} {'x' * i}"} for i, row in enumerate(rows)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "sft.parquet")
    pq.write_table(pa.Table.from_pylist(pairs), folder / "preferences.parquet")
    return folder


def settings(folder: Path, stage: str, output: Path, **changes: Any) -> SupervisedSettings:
    """Return the settings of a stage on the model and data in `folder`; it writes below `output`."""
    dtype = changes.pop("dtype", "float32")
    data = folder / ("sft.parquet" if stage == "sft" else "preferences.parquet")
    return SupervisedSettings(
        LearnerConfig(**changes),
        STAGES[stage],
        Place(folder / "model", dtype),
        (Source(data),),
        output / "out",
        checkpoints_path=output / "checkpoints",
        fresh_path=data if stage == "reward_model" else None,
        reference_path=output / "reference",
    )


def make_rank(rank_settings: SupervisedSettings, ranks: Ranks | None = None) -> SupervisedRank:
    ranks = ranks or Ranks(CPU, distributed=False)
    net = load_net(rank_settings)
    if rank_settings.config.data_parallel == "fsdp2":
        shard_net(net, rank_settings, ranks.size, CPU)
    return SupervisedRank(rank_settings, net, make_adamw(net.parameters()), ranks, CPU)


def stream(rank_settings: SupervisedSettings, ranks: Ranks | None = None) -> Iterator[Row]:
    """Yield counts, steps and result of a stage, as a learner group does, without the progress of DPO's reference."""
    rank = make_rank(rank_settings, ranks)
    yield rank.counts()
    yield from steps(rank)
    yield rank.finish()


def steps(rank: SupervisedRank) -> Iterator[Row]:
    """Yield the steps of a rank."""
    while rows := rank.advance(1):
        yield from (row for row in rows if "step" in row)


def interrupted_after(training: Iterator[Row], step: int) -> None:
    """Run a training until it has yielded the step, then stop it."""
    while next(training).get("step") != step:
        pass


def untimed(rows: list[Row]) -> list[Row]:
    return [{key: value for key, value in row.items() if not key.endswith("_per_s")} for row in rows]


def main(rank: int, size: int, folder: Path) -> None:
    """Train every stage and layout with ddp and fsdp2, uninterrupted and interrupted."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=size)
    torch.set_num_threads(1)
    ranks = Ranks(CPU, distributed=True)
    for stage in STAGES:
        for layout, changes in LAYOUTS.items():
            for data_parallel in ("ddp", "fsdp2"):
                place = folder / f"{stage} {layout} {data_parallel}"
                whole = settings(folder, stage, place / "whole", data_parallel=data_parallel, **changes)
                expected = untimed(list(stream(whole, ranks)))
                again = settings(folder, stage, place / "resumed", data_parallel=data_parallel, **changes)
                interrupted_after(stream(again, ranks), 4)
                assert untimed(list(stream(again, ranks))) == expected
                kept = replace(again, output_path=place / "none", checkpoints_path=place / "kept")
                interrupted_after(stream(kept, ranks), 4)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
