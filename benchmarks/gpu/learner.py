"""The learner's step on a GPU: model FLOPs utilisation, time by phase and peak memory, on Qwen-shaped random models.

Needs no Ray and no vLLM: one rank in this process, bfloat16, sequences of 4,096 tokens. Without a GPU there is nothing
to measure, which it says.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from benchmarks.results import Row
from cluster.trajectory import Segment, Trajectory, Turn
from learner.config import LearnerConfig
from learner.distributed.gradients import make_adamw
from learner.distributed.ranks import Ranks
from learner.model.actor_critic import ActorCritic, ModelSettings, Reference
from learner.ppo.shares import Share
from learner.ppo.step import PPOStep

SHAPES: dict[str, dict[str, int]] = {
    "0.5 B": {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
    },
    "1.5 B": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
    },
}
VOCABULARY, LENGTH, NUM_SEQUENCES = 151_936, 4_096, 16
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
"""Dense bfloat16, by the makers' data sheets."""
REPEATS = 3


def measure(folder: Path) -> list[Row]:
    """Nothing where there is no GPU."""
    if not torch.cuda.is_available():
        print("no GPU here: nothing measured")
        return []
    return [row for name, shape in SHAPES.items() for row in _measure(folder / name, name, shape)]


def make_model(path: Path, shape: dict[str, int]) -> None:
    """Save a random model of that shape, in bfloat16 and with a tokenizer of numbers, as a Hugging Face folder."""
    config = Qwen2Config(vocab_size=VOCABULARY, max_position_embeddings=LENGTH, tie_word_embeddings=True, **shape)
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = Qwen2ForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(path)
    tokenizer = Tokenizer(WordLevel({str(i): i for i in range(VOCABULARY)}, unk_token="0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=str(VOCABULARY - 1)).save_pretrained(path)


def _measure(path: Path, name: str, shape: dict[str, int]) -> list[Row]:
    make_model(path, shape)
    learner = LearnerConfig(
        advantages="grpo",
        num_epochs=1,
        micro_batch_tokens=2 * LENGTH,
        activation_checkpointing=False,
        kl_coefficient=0.0,
    )
    device = torch.device("cuda")
    settings = ModelSettings(path, "bfloat16", "none", 1.0, with_entropy_gradient=False)
    model = ActorCritic(settings).to(device)
    frozen = ActorCritic(replace(settings, is_trained=False)).to(device).requires_grad_(False)
    optimizer, ranks = make_adamw(model.parameters()), Ranks(device, distributed=False)
    step = PPOStep(learner, model, Reference(frozen), optimizer, ranks, device=device, seed=0)
    phases = _Phases(step)
    torch.cuda.reset_peak_memory_stats()
    trajectories, taken = _trajectories(), []
    for _ in range(REPEATS + 1):
        phases.start()
        step.run(1, Share(trajectories, range(NUM_SEQUENCES), NUM_SEQUENCES))
        taken.append(phases.seconds())
    flops = _flops(shape, sum(parameter.numel() for parameter in model.parameters()))
    peak = next((peak for key, peak in PEAK_FLOPS.items() if key in torch.cuda.get_device_name()), None)
    utilisation = tuple(flops / (run["all"] * peak) for run in taken[1:]) if peak else ()
    memory = torch.cuda.max_memory_allocated() / 2**30
    rows = [Row(f"{name}: model FLOPs utilisation of a step", utilisation, "", ">= 0.45")] if peak else []
    rows += [Row(f"{name}: {phase}", tuple(run[phase] for run in taken[1:]), "s") for phase in taken[0]]
    return [*rows, Row(f"{name}: peak GPU memory", (memory,), "GiB")]


class _Phases:
    """Seconds of a step by phase: before the first epoch (two forward passes), and the optimiser steps."""

    def __init__(self, step: Any) -> None:
        self._evaluate, step._evaluate = step._evaluate, self._timed
        self._started = self._evaluated = 0.0

    def start(self) -> None:
        torch.cuda.synchronize()
        self._started = time.perf_counter()

    def _timed(self, *args: Any, **kwargs: Any) -> Any:
        result = self._evaluate(*args, **kwargs)
        torch.cuda.synchronize()
        self._evaluated = time.perf_counter()
        return result

    def seconds(self) -> dict[str, float]:
        torch.cuda.synchronize()
        ended = time.perf_counter()
        evaluated = self._evaluated - self._started
        return {"all": ended - self._started, "evaluation": evaluated, "training": ended - self._evaluated}


def _trajectories() -> list[Trajectory]:
    """Sequences of 4,096 tokens, all but the first 64 sampled, two to a prompt."""
    generator, prompt = torch.Generator().manual_seed(0), 64
    length = LENGTH - prompt
    return [
        Trajectory(
            uid=f"{index}",
            group=index // 2,
            task="bench",
            token_ids=torch.randint(VOCABULARY, (LENGTH,), generator=generator).tolist(),
            mask=[False] * prompt + [True] * length,
            behavior_logprobs=[0.0] * prompt + [-11.9] * length,
            segments=[Segment(0, prompt, length, 0, "bench")],
            turns=[Turn(prompt, length)],
            admission_index=index,
            finish_reason="length",
            reward=float(index % 2),
        )
        for index in range(NUM_SEQUENCES)
    ]


def _flops(shape: dict[str, int], num_parameters: int) -> float:
    """Of a step: the policy's forward pass for the old log-probabilities, the reference's, then forward and backward.

    A token costs 2 FLOPs a weight in a forward pass and twice that in the backward pass, and causal attention
    2 layers x length x hidden size (PaLM, arXiv:2204.02311, appendix B); recomputation is not counted.
    """
    num_tokens = NUM_SEQUENCES * LENGTH
    attention = 2 * shape["num_hidden_layers"] * LENGTH * shape["hidden_size"]
    return (1 + 1 + 3) * num_tokens * (2 * num_parameters + attention)
