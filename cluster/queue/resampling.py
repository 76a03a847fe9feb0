"""Decides which finished groups are replaced by other prompts because their rewards are equal.

Dynamic sampling (DAPO, arXiv:2503.14476, section 3.2): a group whose responses have equal rewards has nothing to teach
an estimator that compares them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cluster.journal.events import EQUAL_REWARDS
from cluster.trajectory import Ticket, Trajectory, have_equal_rewards


class Resampling:
    """Counts the groups with equal rewards that were voided, by their place in training.

    A place is sampled again at most `max_times` (0: never); then its group is trained as it is, so that prompts that
    the policy cannot answer do not stop the run.
    """

    reason = EQUAL_REWARDS

    def __init__(self, max_times: int, *, num_before: int = 0, by_place: Mapping[int, int]) -> None:
        self._max_times = max_times
        self._by_place = dict(by_place)
        self.num = num_before

    def wants(self, ticket: Ticket, trajectories: Sequence[Trajectory]) -> bool:
        """Return whether this finished group is to be replaced."""
        num_before = self._by_place.get(ticket.admission_index, 0)
        return num_before < self._max_times and have_equal_rewards(trajectories)

    def add(self, ticket: Ticket) -> None:
        """Count a group that was replaced."""
        self._by_place[ticket.admission_index] = self._by_place.get(ticket.admission_index, 0) + 1
        self.num += 1
