"""Measure the learner's parts: packing against padding, chunked against whole logits, a second rank, publication.

Every ratio is of alternating measurements (A B A B) in one process tree, with one thread per learner.
"""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.parts.learner_step import batch
from benchmarks.results import Row
from benchmarks.tasks.letters import letters_config, make_task
from cluster.trajectory import Segment, Trajectory, Turn
from learner.config import LearnerConfig, critic_of
from learner.distributed.gradients import make_adamw
from learner.distributed.ranks import Ranks
from learner.model.actor_critic import ActorCritic, ModelSettings, Reference
from learner.place import Place
from learner.ppo.group import PPOLearnerGroup
from learner.ppo.rank import LearnerSettings
from learner.ppo.shares import Share
from learner.ppo.step import PPOStep

CPU = torch.device("cpu")
NUM_SEQUENCES, MEDIAN_TOKENS, SIGMA, MAX_TOKENS = 32, 48, 1.0, 512
REPEATS = 5
VOCABULARY, CHUNKED_TOKENS = 150_000, 1_024


def measure(folder: Path) -> list[Row]:
    """Measure all figures that need no GPU."""
    torch.set_num_threads(1)
    packing = _packing(folder / "lengths")
    memory = _memory(folder / "vocabulary")
    model, _ = make_task(folder)
    large = _write_model(folder / "large", hidden_size=512, intermediate_size=2048, num_hidden_layers=16, vocab=32_000)
    ray.init("local", num_cpus=8, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        return (
            packing + memory + asyncio.run(_ranks(model)) + asyncio.run(_publication({"letters": model, "85 M": large}))
        )
    finally:
        ray.shutdown()


def _write_model(path: Path, *, vocab: int, **shape: int) -> Path:
    """Write a random Llama with heads of size 32 as a model folder."""
    heads = shape["hidden_size"] // 32
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=vocab, num_attention_heads=heads, num_key_value_heads=heads, **shape)
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def _log_normal(num: int) -> list[Trajectory]:
    """Return trajectories with responses of log-normal lengths after a prompt of eight tokens."""
    draw = random.Random(0)
    lengths = [min(MAX_TOKENS, max(1, round(draw.lognormvariate(0, SIGMA) * MEDIAN_TOKENS))) for _ in range(num)]
    return [
        Trajectory(
            uid=f"{index}",
            group=index,
            task="bench",
            token_ids=[draw.randrange(40) for _ in range(8 + length)],
            mask=[False] * 8 + [True] * length,
            behavior_logprobs=[0.0] * 8 + [-3.8] * length,
            segments=[Segment(0, 8, length, 0, "bench")],
            turns=[Turn(8, length)],
            admission_index=index,
            finish_reason="stop",
            reward=draw.random(),
        )
        for index, length in enumerate(lengths)
    ]


def _stepper(path: Path, **changes: Any) -> Callable[[list[Trajectory]], float]:
    """Return a function that measures the seconds of a PPO step in this process with these settings."""
    config = LearnerConfig(num_epochs=2, learning_rate=1e-4, **changes)
    settings = ModelSettings(path, "float32", critic_of(config), 1.0, packing=config.packing)
    model, reference = ActorCritic(settings), ActorCritic(replace(settings, critic="none"))
    optimizer, ranks = make_adamw(model.parameters()), Ranks(CPU, distributed=False)
    step = PPOStep(config, model, Reference(reference.requires_grad_(False)), optimizer, ranks, device=CPU, seed=0)

    def seconds(trajectories: list[Trajectory]) -> float:
        started = time.perf_counter()
        step.run(1, Share(trajectories, range(len(trajectories)), len(trajectories)))
        return time.perf_counter() - started

    return seconds


def _packing(path: Path) -> list[Row]:
    """Measure tokens/s of packed steps over padded steps, on the same trajectories."""
    _write_model(path, vocab=48, hidden_size=160, intermediate_size=448, num_hidden_layers=4)
    trajectories = _log_normal(NUM_SEQUENCES)
    ways = {
        "packed": _stepper(path),
        "padded": _stepper(path, packing=False, micro_batch_tokens=10**9),
        "sorted": _stepper(path, packing=False, micro_batch_tokens=4_096),
    }
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(REPEATS + 1):
        for name, seconds in ways.items():
            taken[name].append(seconds(trajectories))
    num_tokens = sum(len(trajectory.token_ids) for trajectory in trajectories)
    share = num_tokens / (NUM_SEQUENCES * max(len(trajectory.token_ids) for trajectory in trajectories))

    def over(name: str) -> tuple[float, ...]:
        return tuple(a / b for a, b in zip(taken[name][1:], taken["packed"][1:], strict=True))

    return [
        Row("log-normal lengths: tokens/s packed over padded", over("padded"), "x", ">= 1.6"),
        Row("log-normal lengths: tokens/s packed over padded in pieces sorted by length", over("sorted"), "x"),
        Row("log-normal lengths: share of the padded batch that is tokens", (share,)),
        Row("log-normal lengths: packed", tuple(num_tokens / s for s in taken["packed"][1:]), "tokens/s"),
    ]


def _memory(path: Path) -> list[Row]:
    """Measure the additional peak memory of a forward and backward pass, each in a separate process."""
    _write_model(path, vocab=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=1)
    found = {}
    for name, chunk in (("whole", 10**9), ("chunked", 128)):
        command = [sys.executable, "-m", "benchmarks.tasks.peak_memory", str(path), str(CHUNKED_TOKENS), str(chunk)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found[name] = json.loads(done.stdout)["peak_bytes"] / 2**30
    return [
        Row(
            f"{VOCABULARY:,} tokens in the vocabulary, {CHUNKED_TOKENS:,} sampled: peak memory",
            (found["whole"],),
            "GiB",
        ),
        Row("the same, log-probabilities in chunks of 128", (found["chunked"],), "GiB"),
        Row("chunked over whole", (found["chunked"] / found["whole"],)),
    ]


async def _ranks(model: Path) -> list[Row]:
    """Compare steps of one and of two learners of one thread each, on batches of 1 and 4 times the letters' size."""
    settings = letters_config(num_steps=100, max_policy_lag=0)
    groups = [
        await PPOLearnerGroup.start(
            LearnerSettings(settings.learner.model_copy(update={"num_learners": num}), Place(model))
        )
        for num in (1, 2)
    ]
    taken: list[list[float]] = [[], []]
    try:
        for step in range(1, REPEATS + 3):
            trajectories = [[trajectory] for trajectory in batch(step, 4 * settings.trajectory_queue.groups_per_step)]
            for seconds, group in zip(taken, groups, strict=True):
                seconds.append((await group.step(step, trajectories)).metrics["learner/step_s"])
    finally:
        for group in groups:
            await group.shutdown()
    ratios = tuple(a / b for a, b in zip(taken[0][2:], taken[1][2:], strict=True))
    return [Row("256 letters episodes: a step on one rank over one on two", ratios, "x")]


async def _publication(models: dict[str, Path]) -> list[Row]:
    """Measure the seconds to publish a version: probe, checksums and the object store."""
    rows = []
    for name, path in models.items():
        config = LearnerConfig(num_learners=1, num_threads=1, advantages="grpo")
        group = await PPOLearnerGroup.start(LearnerSettings(config, Place(path)))
        taken = []
        try:
            for _ in range(REPEATS + 1):
                started = time.perf_counter()
                manifest = await group.publish_initial()
                taken.append(time.perf_counter() - started)
        finally:
            await group.shutdown()
        size = sum(_num_bytes(entry) for entry in manifest.tensors) / 2**20
        rows.append(Row(f"publication, {name} parameters ({size:,.0f} MiB)", tuple(taken[1:]), "s"))
    return rows


def _num_bytes(entry: Any) -> int:
    return int(entry.reference.stop - entry.reference.start)
