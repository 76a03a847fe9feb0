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
    """This rank's trajectories of a step with their places among its `num_total`, in admission order."""

    trajectories: Sequence[Trajectory]
    places: Sequence[int]
    num_total: int


def split(groups: Groups, num_ranks: int) -> list[Share]:
    """Whole groups for each rank, in admission order, that cost about the same to compute."""
    if len(groups) < num_ranks:
        raise LearnerError("learner.num_learners", f"{len(groups)} groups are too few for {num_ranks} learners")
    ends = [0, *accumulate(map(len, groups))]
    costs = [sum(cost(len(trajectory.token_ids)) for trajectory in group) for group in groups]
    shares = []
    for numbers in balanced(costs, num_ranks):
        places = [place for number in numbers for place in range(ends[number], ends[number + 1])]
        shares.append(Share([t for number in numbers for t in groups[number]], places, ends[-1]))
    return shares


@dataclass
class StepData(TrainingData):
    """A step's trajectories, one share a rank: what RLlib carries from the group to its learners."""

    step: int = 0
    shares: Sequence[Share] = ()

    def validate(self) -> None:
        """Nothing to choose between: there are only shares."""

    def shard(self, num_shards: int, **_: Any) -> list[tuple[StepData, dict[str, Any]]]:
        """One part for each rank."""
        return [(StepData(step=self.step, shares=[share]), {}) for share in self.shares]

    def solve_refs(self) -> None:
        """Nothing: trajectories travel by value."""

    @property
    def share(self) -> Share:
        """The only share, on the rank that it was sent to."""
        (share,) = self.shares
        return share
