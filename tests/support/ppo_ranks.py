"""Trains PPO ranks without Ray: `python -m tests.support.ppo_ranks RANK SIZE FOLDER` runs every case."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from cluster.trajectory import Trajectory
from learner.config import ConstraintConfig, LearnerConfig, LoraConfig
from learner.distributed.gradients import make_adamw
from learner.distributed.ranks import Ranks
from learner.model.actor_critic import ActorCritic
from learner.place import Place
from learner.ppo.rank import LearnerSettings, PPORank, shard_actor_critic
from learner.ppo.shares import Share
from tests.learner.conftest import make_trajectory, make_two_turn_trajectory

CPU = torch.device("cpu")
BASE: dict[str, Any] = {
    "num_epochs": 2,
    "num_minibatches": 2,
    "learning_rate": 1e-3,
    "entropy_coefficient": 0.01,
    "kl_target": 0.5,
    "kl_horizon": 100.0,
    "normalize_rewards": True,
    "constraint": ConstraintConfig(cost="cost", max_mean=0.3),
}
NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "shared, float64": ("float64", {}),
    "separate": (
        "float32",
        {
            "critic": "separate",
            "normalize_by": "batch",
            "micro_batch_tokens": 40,
            "logprob_chunk_tokens": 5,
            "activation_checkpointing": True,
        },
    ),
    "lora": ("float32", {"lora": LoraConfig(rank=4), "critic": "separate"}),
    "half": ("bfloat16", {}),
}


CARRIER = "tests.support.carriers:NoCarrier"


def settings(path: Path, network: str, data_parallel: str, checkpoint_path: Path | None = None) -> LearnerSettings:
    dtype, changes = NETWORKS[network]
    config = LearnerConfig(**{**BASE, **changes, "data_parallel": data_parallel, "weight_carrier": CARRIER})
    version = 0 if checkpoint_path is None else 2
    place = Place(path, dtype, checkpoint_path=checkpoint_path)
    return LearnerSettings(config, place, 0.7, tasks=("other", "test"), version=version)


def trajectories(step: int) -> list[Trajectory]:
    """Make seven trajectories of different lengths and one of two turns.

    Half of them were sampled by the version before. Two belong to another task; of two ranks the first has both.
    """
    plain = [make_trajectory(i, version=max(0, step - 1 - i % 2), seed=step) for i in range(7)]
    plain = [replace(t, task="other", reward=50.0 + i) if i in (0, 4) else t for i, t in enumerate(plain)]
    return [*plain, make_two_turn_trajectory(7, version=max(-1, step - 2), seed=step)]


def share(step: int, rank: int, size: int) -> Share:
    """Make unequal shares: the first rank has one trajectory more than the others."""
    everything = trajectories(step)
    places = [place for place in range(len(everything)) if (place * 5 // 8 if size > 1 else 0) % size == rank]
    return Share([everything[place] for place in places], places, len(everything))


def make_rank(rank_settings: LearnerSettings, ranks: Ranks) -> PPORank:
    model = ActorCritic(rank_settings.model())
    if rank_settings.config.data_parallel == "fsdp2":
        shard_actor_critic(model, rank_settings, ranks.size, CPU)
    return PPORank(rank_settings, model, make_adamw(model.parameters()), ranks, CPU)


def train(rank_settings: LearnerSettings, ranks: Ranks, folder: Path) -> dict[str, float]:
    """Train to step 3, from the start or from the checkpoint.

    Writes a checkpoint per step below `folder`.
    """
    rank = make_rank(rank_settings, ranks)
    for step in range(rank_settings.version + 1, 4):
        result = rank.update(step, share(step, ranks.rank, ranks.size))
        rank.save_checkpoint(folder / f"step-{step}", {"position.json": "{}"})
    metrics = {name: value for name, value in result.metrics.items() if name != "learner/step_s"}
    return metrics | {"kl": sum(rank.reference_kl(trajectories(4)[ranks.rank : 8 - ranks.rank]))}


def main(rank: int, size: int, folder: Path) -> None:
    """Train every network with ddp and fsdp2, and each again from its second checkpoint."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=size)
    torch.set_num_threads(1)
    ranks = Ranks(CPU, distributed=True)
    for network in NETWORKS:
        for data_parallel in ("ddp", "fsdp2"):
            place = folder / f"{network} {data_parallel}"
            whole = train(settings(folder / "policy", network, data_parallel), ranks, place / "whole")
            kept = settings(folder / "policy", network, data_parallel, place / "whole" / "step-2")
            assert train(replace(kept), ranks, place / "resumed") == whole
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
