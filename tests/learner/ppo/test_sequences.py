"""Trajectories of several sequences: each is computed alone, rewards and advantages are the conversation's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cluster.errors import LearnerError
from cluster.trajectory import Segment, Trajectory, Turn
from learner.config import LearnerConfig
from learner.distributed.ranks import Ranks
from learner.ppo.batch import make_batch
from learner.ppo.experience import AdvantageComputer, Evaluation
from learner.ppo.sequences import by_sequence
from tests.learner.conftest import make_trajectory
from tests.learner.ppo.test_rllib import OneRank, largest_difference

ALONE = Ranks(torch.device("cpu"), distributed=False)


def joined(parts: list[Trajectory]) -> Trajectory:
    """Return one conversation whose sequences are these trajectories."""
    token_ids, mask, logprobs = list[int](), list[bool](), list[float]()
    segments, turns, starts = list[Segment](), list[Turn](), list[int]()
    for part in parts:
        start = len(token_ids)
        starts += [start] if start else []
        segments += [replace(segment, start=start + segment.start) for segment in part.segments]
        turns += [replace(turn, start=start + turn.start) for turn in part.turns]
        token_ids, mask, logprobs = token_ids + part.token_ids, mask + part.mask, logprobs + part.behavior_logprobs
    return replace(
        parts[0],
        token_ids=token_ids,
        mask=mask,
        behavior_logprobs=logprobs,
        segments=segments,
        turns=turns,
        sequence_starts=starts,
    ).check()


def parts_and_conversations() -> tuple[list[Trajectory], list[Trajectory]]:
    """Return trajectories of one turn, and the same as conversations of three, one and two sequences."""
    rewards = (1.0, 1.0, 1.0, -0.5, 2.0, 2.0)
    parts = [make_trajectory(i, reward=reward) for i, reward in enumerate(rewards)]
    return parts, [joined(parts[:3]), parts[3], joined(parts[4:])]


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("max_tokens", [16_384, 20])
def test_training_on_sequences_is_that_on_separate_trajectories(
    policy_path: Path, packing: bool, max_tokens: int
) -> None:
    config = LearnerConfig(
        advantages="reinforce_pp", whiten_advantages=False, kl_coefficient=0.0, learning_rate=1e-2, num_minibatches=1
    ).model_copy(update={"packing": packing})
    weights, logprobs = [], []
    for trajectories in parts_and_conversations():
        learner = OneRank(policy_path, config, dtype="float64", sgd=True, max_tokens=max_tokens)
        batch = make_batch(trajectories)
        logprobs.append(learner._step.logprobs(batch)[batch.mask])
        learner.step(1, trajectories)
        weights.append(learner.weights())
    assert torch.allclose(logprobs[0], logprobs[1], atol=1e-12)
    assert largest_difference(*weights) < 1e-12


@pytest.mark.parametrize("estimator", ["grpo", "rloo", "dr_grpo"])
def test_a_conversation_counts_once_in_its_group(estimator: str) -> None:
    _, conversations = parts_and_conversations()
    advantages = []
    for several in (conversations, [replace(c, sequence_starts=[]) for c in conversations]):
        batch = make_batch([replace(conversation, group=0) for conversation in several])
        zeros = torch.zeros(batch.mask.shape)
        config = LearnerConfig.model_validate({"advantages": estimator, "kl_coefficient": 0.0})
        evaluation = Evaluation(batch, batch.behavior_logprobs, batch.behavior_logprobs, zeros, zeros)
        advantages.append(AdvantageComputer(config, ALONE).compute(1, evaluation).advantages)
        own = [row[mask].unique() for row, mask in zip(advantages[-1], batch.mask, strict=True)]
        assert [len(values) for values in own] == [1, 1, 1], "all turns have the conversation's advantage"
    assert torch.equal(advantages[0], advantages[1])
    assert advantages[0].abs().max() > 0


def test_outputs_are_computed_from_each_sequence_alone() -> None:
    _, conversations = parts_and_conversations()
    batch = make_batch(conversations)
    seen: list[list[int]] = []

    def compute(token_ids: torch.Tensor, mask: torch.Tensor, lengths: object) -> list[torch.Tensor]:
        assert isinstance(lengths, list)
        seen.extend(row[:length].tolist() for row, length in zip(token_ids, lengths, strict=True))
        return [torch.where(mask, token_ids.float(), 0.0)]

    (found,) = by_sequence(compute, batch.token_ids, batch.mask, batch.sequences)
    assert torch.equal(found, torch.where(batch.mask, batch.token_ids.float(), 0.0))
    assert seen == [part.token_ids for part in parts_and_conversations()[0]]


@pytest.mark.parametrize("max_tokens", [1, 20, 30])
def test_many_sequences_are_computed_in_parts(max_tokens: int) -> None:
    _, conversations = parts_and_conversations()
    batch = make_batch(conversations)
    weight = torch.ones((), requires_grad=True)
    sizes: list[list[int]] = []

    def compute(token_ids: torch.Tensor, mask: torch.Tensor, lengths: Sequence[int]) -> list[torch.Tensor]:
        sizes.append(list(lengths))
        return [torch.where(mask, token_ids * weight, 0.0)]

    (found,) = by_sequence(compute, batch.token_ids, batch.mask, batch.sequences, max_tokens=max_tokens)
    assert torch.equal(found, torch.where(batch.mask, batch.token_ids.float(), 0.0))
    parts = list(sizes)
    assert [length for part in parts for length in part] == [n for row in batch.sequences for n in row]
    assert all(len(part) == 1 or sum(part) <= max_tokens for part in parts)
    found.sum().backward()
    assert float(weight.grad) == float((batch.token_ids * batch.mask).sum())  # type: ignore[arg-type]
    assert len(sizes) == 2 * len(parts), "each part is computed again in the backward pass"


def test_a_sequence_without_a_prompt_is_refused() -> None:
    part = make_trajectory(0)
    start = part.turns[0].start
    with pytest.raises(LearnerError, match="a first token is sampled, but nothing stands before it"):
        make_batch([replace(part, sequence_starts=[start])])
