"""Turns trajectories into tensors padded on the right, and draws mini-batches.

Shapes: B trajectories, T tokens of the longest.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cluster.errors import LearnerError
from cluster.trajectory import Trajectory


@dataclass(frozen=True, slots=True)
class Batch:
    """Padded trajectories. `mask` is true on sampled tokens, each of which has a token before it."""

    uids: tuple[str, ...]
    tasks: tuple[str, ...]
    lengths: tuple[int, ...]
    sequences: tuple[tuple[int, ...], ...]
    """The lengths of each row's sequences, which are computed separately; most rows have one."""
    token_ids: Tensor
    """[B, T] int64; 0 after the end."""
    mask: Tensor
    """[B, T] bool."""
    behavior_logprobs: Tensor
    """[B, T] float32; 0 where the mask is false."""
    versions: Tensor
    """[B, T] int64: the policy version that sampled the token; 0 where the mask is false."""
    scores: Tensor
    """[B] float32: the final rewards."""
    groups: Tensor
    """[B] int64: the number of the row's prompt."""
    ends: Tensor
    """[B] bool: the response ended with the end-of-sequence token and was not cut off."""
    turn_rewards: Tensor
    """[B, T] float32: each turn's immediate reward at its last token."""
    costs: Tensor
    """[B] float32: the part of the reward that the constraint bounds; 0 without a constraint."""


def make_batch(
    trajectories: Sequence[Trajectory], *, device: torch.device | None = None, cost: str | None = None
) -> Batch:
    """Pad trajectories to the longest; `cost` names the part of the reward that is the cost.

    Raises LearnerError naming a trajectory without a finite reward or cost, or without a sampled token.
    """
    for trajectory in trajectories:
        _check(trajectory)
    lengths = tuple(len(trajectory.token_ids) for trajectory in trajectories)
    shape = (len(lengths), max(lengths))
    token_ids: np.ndarray = np.zeros(shape, np.int64)
    mask: np.ndarray = np.zeros(shape, np.bool_)
    behavior_logprobs: np.ndarray = np.zeros(shape, np.float32)
    versions: np.ndarray = np.zeros(shape, np.int64)
    turn_rewards: np.ndarray = np.zeros(shape, np.float32)
    for row, (trajectory, length) in enumerate(zip(trajectories, lengths, strict=True)):
        token_ids[row, :length] = trajectory.token_ids
        mask[row, :length] = trajectory.mask
        behavior_logprobs[row, :length] = trajectory.behavior_logprobs
        for segment in trajectory.segments:
            versions[row, segment.start : segment.start + segment.length] = segment.policy_version
        for turn in trajectory.turns:
            if turn.reward is not None and turn.length:
                turn_rewards[row, turn.start + turn.length - 1] += turn.reward
    scores = np.array([trajectory.reward for trajectory in trajectories], np.float32)
    groups = np.array([trajectory.group for trajectory in trajectories], np.int64)
    ends = np.array([trajectory.finish_reason == "stop" for trajectory in trajectories], np.bool_)
    costs = np.array([0.0 if cost is None else _cost(trajectory, cost) for trajectory in trajectories], np.float32)
    arrays = (token_ids, mask, behavior_logprobs, versions, scores, groups, ends, turn_rewards, costs)
    uids, tasks = (tuple(getattr(t, name) for t in trajectories) for name in ("uid", "task"))
    sequences = tuple(tuple(trajectory.sequence_lengths) for trajectory in trajectories)
    return Batch(uids, tasks, lengths, sequences, *(torch.from_numpy(a).to(device) for a in arrays))


def _check(trajectory: Trajectory) -> None:
    trajectory.check()
    where, uids = f"trajectory {trajectory.uid}", [trajectory.uid]
    if trajectory.reward is None or not np.isfinite(trajectory.reward):
        raise LearnerError(where, f"its reward is {trajectory.reward}", uids=uids)
    if any(turn.reward is not None and not np.isfinite(turn.reward) for turn in trajectory.turns):
        rewards = [turn.reward for turn in trajectory.turns]
        raise LearnerError(where, f"a turn's reward is not finite: {rewards}", uids=uids)
    if not np.isfinite(trajectory.behavior_logprobs).all():
        raise LearnerError(where, "a behavior logprob is not finite", uids=uids)
    if not any(trajectory.mask):
        raise LearnerError(where, "it has no sampled token to learn from", uids=uids)
    if any(trajectory.mask[start] for start in (0, *trajectory.sequence_starts)):
        raise LearnerError(where, "a first token is sampled, but nothing stands before it", uids=uids)


def _cost(trajectory: Trajectory, name: str) -> float:
    cost = trajectory.reward_parts.get(name)
    if cost is None or not np.isfinite(cost):
        found = f"there are {', '.join(sorted(trajectory.reward_parts)) or 'none'}" if cost is None else f"it is {cost}"
        problem = f"its reward has no finite part {name!r} (learner.constraint.cost): {found}"
        raise LearnerError(f"trajectory {trajectory.uid}", problem, uids=[trajectory.uid])
    return cost


def minibatch_order(num: int, *, num_minibatches: int, seed: int, step: int, epoch: int) -> list[list[int]]:
    """Draw the mini-batches of a step's `num` trajectories of all ranks; depends on the arguments only.

    Each mini-batch is in admission order. Raises LearnerError if the batch does not divide.
    """
    if num % num_minibatches:
        raise LearnerError("learner.num_minibatches", f"{num} trajectories do not divide by {num_minibatches}")
    order = list(range(num))
    if num_minibatches > 1:
        random.Random(f"minibatches:{seed}:{step}:{epoch}").shuffle(order)
    size = num // num_minibatches
    return [sorted(order[start : start + size]) for start in range(0, num, size)]
