"""Small policies and trajectories, drawn from a seed, for the learner's tests."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.trajectory import Segment, Trajectory, Turn

VOCABULARY = 48


def write_policy(path: Path, *, seed: int = 0, **overrides: Any) -> Path:
    """Write a random two-layer Llama as a Hugging Face folder, with a tokenizer of one letter per token."""
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    shape: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
        "initializer_range": 0.2,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**(shape | overrides)))
    model.generation_config.temperature = 0.7
    model.generation_config.do_sample = True
    model.save_pretrained(path)
    vocabulary = {chr(ord("A") + index): index for index in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="A"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="B", pad_token="A").save_pretrained(path)
    return path


def make_trajectory(index: int, *, version: int = 0, seed: int = 0, reward: float | None = None) -> Trajectory:
    """Make one turn of 3 to 9 tokens after a prompt of 2 to 5, with random log-probabilities."""
    draw = random.Random(f"{seed}:{index}")
    prompt, response = draw.randint(2, 5), draw.randint(3, 9)
    return Trajectory(
        uid=f"{seed}-{index}-0",
        group=index,
        task="test",
        token_ids=[draw.randrange(VOCABULARY) for _ in range(prompt + response)],
        mask=[False] * prompt + [True] * response,
        behavior_logprobs=[0.0] * prompt + [-3.0 - draw.random() for _ in range(response)],
        segments=[Segment(version, prompt, response, 1, "actor-0")],
        turns=[Turn(prompt, response)],
        admission_index=index,
        finish_reason="stop",
        reward=draw.random() if reward is None else reward,
        reward_parts={"cost": draw.random()},
    )


def make_two_turn_trajectory(index: int, *, version: int = 0, seed: int = 0) -> Trajectory:
    """Make a prompt, a response sampled across a swap, another speaker's turn and a second response.

    Both responses are rewarded.
    """
    draw = random.Random(f"two:{seed}:{index}")
    spans = [Turn(2, 4, 0.25), Turn(9, 3, -0.5)]
    mask = [any(turn.start <= t < turn.start + turn.length for turn in spans) for t in range(12)]
    return Trajectory(
        uid=f"{seed}-{index}-two",
        group=index,
        task="test",
        token_ids=[draw.randrange(VOCABULARY) for _ in range(12)],
        mask=mask,
        behavior_logprobs=[-3.0 - draw.random() if sampled else 0.0 for sampled in mask],
        segments=[
            Segment(version, 2, 1, 1, "actor-0"),
            Segment(version + 1, 3, 3, 2, "actor-0"),
            Segment(version + 1, 9, 3, 3, "actor-1"),
        ],
        turns=spans,
        admission_index=index,
        finish_reason="stop",
        reward=1.0,
        reward_parts={"cost": 1.0},
    )


def run_two_ranks(module: str, folder: Path) -> None:
    """Run `python -m MODULE RANK 2 FOLDER` as two processes, which connect through the folder."""
    command = [sys.executable, "-m", module]
    started = [
        subprocess.Popen([*command, str(rank), "2", str(folder)], stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=240)[1] for process in started]
    assert [process.returncode for process in started] == [0, 0], "\n".join(error[-3000:] for error in errors)


async def rank_process_ids(group: Any) -> list[int]:
    """Return the process ids of a learner group's remote ranks, in rank order."""
    return [await rank.handle.__ray_call__.remote(lambda learner: os.getpid()) for rank in group._group.ranks]


@pytest.fixture(scope="session")
def policy_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied policy of two layers; read only."""
    return write_policy(tmp_path_factory.mktemp("policy") / "tied")


@pytest.fixture(scope="session")
def trajectories() -> Callable[..., list[Trajectory]]:
    """`trajectories(num, version=, seed=)`."""

    def make(num: int, **kwargs: Any) -> list[Trajectory]:
        return [make_trajectory(index, **kwargs) for index in range(num)]

    return make
