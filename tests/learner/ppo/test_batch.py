"""Trajectories become tensors, micro-batches and mini-batches."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pytest
import torch

from cluster.errors import LearnerError, TrajectoryRefused
from cluster.trajectory import from_table, to_table
from learner.model.microbatches import balanced, cost, micro_batches
from learner.ppo import advantages as adv
from learner.ppo import losses
from learner.ppo.batch import make_batch, minibatch_order
from tests.learner.conftest import make_trajectory, make_two_turn_trajectory


def test_a_batch_is_padded_on_the_right_with_the_version_of_every_token() -> None:
    short, two_turns = make_trajectory(0, version=3), make_two_turn_trajectory(1, version=4)
    batch = make_batch([short, two_turns])
    length = len(short.token_ids)
    assert batch.token_ids[0].tolist() == short.token_ids + [0] * (batch.token_ids.shape[1] - length)
    assert batch.mask[1].tolist() == two_turns.mask
    assert batch.versions[1].tolist() == [0, 0, 4, 5, 5, 5, 0, 0, 0, 5, 5, 5]
    assert batch.turn_rewards[1].tolist() == [0, 0, 0, 0, 0, 0.25, 0, 0, 0, 0, 0, -0.5]
    assert batch.uids == (short.uid, two_turns.uid)


def test_a_two_turn_trajectory_passes_from_arrow_to_the_loss() -> None:
    table = to_table([make_two_turn_trajectory(0), make_trajectory(1)])
    with pa.BufferOutputStream() as sink:
        with pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        arrived = from_table(pa.ipc.open_file(sink.getvalue()).read_all())
    batch = make_batch(arrived)
    kl = torch.zeros_like(batch.behavior_logprobs)
    rewards = adv.token_rewards(batch.scores, kl, batch.mask, kl_coefficient=0.1, turn_rewards=batch.turn_rewards)
    assert rewards[0].tolist() == [0, 0, 0, 0, 0, 0.25, 0, 0, 0, 0, 0, 0.5]

    advantages, _ = adv.gae(rewards, torch.zeros_like(rewards), batch.mask, gamma=1.0, lam=0.5)
    second = [0.125, 0.25, 0.5]
    first = [(0.25 + 0.5 * second[0]) * 0.5**k for k in (3, 2, 1, 0)]
    expected = torch.tensor([0, 0, *first, 0, 0, 0, *second])
    torch.testing.assert_close(advantages[0, :12], expected)

    current = batch.behavior_logprobs.clone().requires_grad_()
    terms = losses.policy_loss(
        current,
        proximal_logprobs=batch.behavior_logprobs,
        advantages=advantages,
        mask=batch.mask,
        clip=0.2,
    )
    losses.token_mean(terms.loss, batch.mask, float(batch.mask.sum())).backward()
    assert current.grad is not None
    torch.testing.assert_close(current.grad, -advantages / batch.mask.sum())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reward": None}, "its reward is None"),
        ({"reward": float("nan")}, "its reward is nan"),
        ({"behavior_logprobs": [float("-inf")] * 3}, "a behavior logprob is not finite"),
        ({"mask": [False] * 3, "segments": [], "turns": []}, "no sampled token"),
    ],
)
def test_an_error_names_a_trajectory_that_cannot_be_trained_on(change: dict[str, Any], message: str) -> None:
    whole = make_trajectory(7)
    plain = replace(
        whole,
        token_ids=[1, 2, 3],
        mask=[False, False, True],
        behavior_logprobs=[0.0, 0.0, -1.0],
        segments=[replace(whole.segments[0], start=2, length=1)],
        turns=[replace(whole.turns[0], start=2, length=1)],
    )
    make_batch([plain])
    with pytest.raises(LearnerError, match=f"trajectory 0-7-0: .*{message}"):
        make_batch([plain, replace(plain, **change)])


def test_an_error_names_a_trajectory_with_inconsistent_lengths() -> None:
    with pytest.raises(TrajectoryRefused, match="0-7-0: per-token lengths disagree"):
        make_batch([replace(make_trajectory(7), behavior_logprobs=[0.0])])


@pytest.mark.parametrize("packed", [True, False])
def test_micro_batches_hold_every_sequence_once_within_the_budget(
    packed: bool,
) -> None:
    lengths = [5, 30, 7, 7, 12, 64, 3]

    def size(piece: list[int]) -> int:
        chosen = [lengths[index] for index in piece]
        return sum(chosen) if packed else len(chosen) * max(chosen)

    whole = list(range(7))
    assert micro_batches(lengths, size(whole), packed=packed) == [whole]
    pieces = micro_batches(lengths, 40, packed=packed)
    assert sorted(index for piece in pieces for index in piece) == whole
    assert all(len(piece) == 1 or size(piece) <= 40 for piece in pieces)
    assert [5] in pieces
    assert micro_batches([], 40, packed=packed) == []


def test_packed_micro_batches_cost_about_the_same() -> None:
    draw = random.Random(0)
    lengths = [max(1, round(draw.lognormvariate(4, 1))) for _ in range(200)]
    pieces = micro_batches(lengths, 2000, packed=True)
    sizes = [sum(lengths[index] for index in piece) for piece in pieces]
    assert len(pieces) <= -(-sum(lengths) // 2000) + 1
    assert max(sizes) <= 1.05 * sum(sizes) / len(sizes)


def test_costs_are_balanced_without_empty_lists() -> None:
    assert balanced([8, 7, 6, 5, 4], 2) == [[0, 3, 4], [1, 2]]
    assert balanced([1, 1], 3) == [[0], [1]]
    assert cost(10) == pytest.approx(10, rel=1e-3)
    assert cost(24_576) == 2 * 24_576


def test_the_order_of_minibatches_depends_on_seed_step_and_epoch() -> None:
    def order(seed: int = 0, step: int = 1, epoch: int = 0) -> list[list[int]]:
        return minibatch_order(12, num_minibatches=3, seed=seed, step=step, epoch=epoch)

    assert order() == order()
    assert sorted(index for minibatch in order() for index in minibatch) == list(range(12))
    assert [len(minibatch) for minibatch in order()] == [4, 4, 4]
    assert len({str(order(seed=1)), str(order(step=2)), str(order(epoch=1)), str(order())}) == 4
    with pytest.raises(LearnerError, match=r"learner\.num_minibatches: 12 trajectories do not divide by 5"):
        minibatch_order(12, num_minibatches=5, seed=0, step=1, epoch=0)
