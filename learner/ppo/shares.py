"""Split the data of a step among ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from ray.rllib.core.learner.training_data import TrainingData

from cluster.errors import LearnerError
from cluster.trajectory import Trajectory
from learner.model.microbatches import balanced, cost
from learner.training_loop import Groups


@dataclass(frozen=True, slots=True)
class Share:
    """A rank's trajectories of a step, and their places among the step's `num_total`, in admission order."""

    trajectories: Sequence[Trajectory]
    places: Sequence[int]
    num_total: int


def split(groups: Groups, num_ranks: int) -> list[Share]:
    """Split groups among ranks, in admission order, so that the ranks' costs are about equal.

    Groups stay whole.
    """
    if len(groups) < num_ranks:
        raise LearnerError("learner.num_learners", f"{len(groups)} groups are too few for {num_ranks} learners")
    ends = [0, *accumulate(map(len, groups))]
    costs = [sum(cost(length) for trajectory in group for length in trajectory.sequence_lengths) for group in groups]
    shares = []
    for numbers in balanced(costs, num_ranks):
        places = [place for number in numbers for place in range(ends[number], ends[number + 1])]
        shares.append(Share([t for number in numbers for t in groups[number]], places, ends[-1]))
    return shares


@dataclass
class StepData(TrainingData):
    """A step's trajectories, one share per rank, as RLlib carries them to its learners."""

    step: int = 0
    shares: Sequence[Share] = ()

    def validate(self) -> None:
        """No-op: RLlib's alternatives to shares are not used."""

    def shard(self, num_shards: int, **_: Any) -> list[tuple[StepData, dict[str, Any]]]:
        """Return one part per rank."""
        return [(StepData(step=self.step, shares=[share]), {}) for share in self.shares]

    def solve_refs(self) -> None:
        """No-op: trajectories are passed by value."""

    @property
    def share(self) -> Share:
        """The only share, on the rank that received it."""
        (share,) = self.shares
        return share
