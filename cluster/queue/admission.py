"""Choose the next group to admit: its number, its floor, and how returned, voided or suspected groups are handled.

Group i is trained in step i // B + 1; its floor (oldest allowed version) is i // B - L. If a group is voided, the next
prompt takes its place in training. Synchronous bookkeeping without I/O.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Sequence
from dataclasses import replace

from cluster.config import TrajectoryQueueConfig
from cluster.data.prompt_order import MixedPrompts, TaskPrompts
from cluster.ledger import ResumePoint
from cluster.trajectory import Ticket

SUSPECT_DEATHS = 2
"""A group is suspected of killing actors after this many died while holding it."""


class Admission:
    """Draws tickets: returned groups first, in order, then new ones as far as the published version allows."""

    def __init__(
        self,
        config: TrajectoryQueueConfig,
        prompts: Sequence[TaskPrompts],
        *,
        run_seed: int,
        num_steps: int,
        standing: ResumePoint,
    ) -> None:
        self._config = config
        self._order = MixedPrompts(prompts, run_seed)
        self._run_seed = run_seed
        self._num_groups = num_steps * config.groups_per_step
        self._next_group = standing.next_group
        self._next_index = standing.next_index
        self._free: list[tuple[int, Ticket | None]] = [(index, None) for index in standing.vacant]
        self._suspects: list[tuple[int, Ticket | None]] = []
        self._deaths: dict[int, tuple[str, ...]] = {}
        self._on_trial: dict[str, int] = {}
        for group in standing.open:
            ticket = replace(self._ticket(group.group, group.admission_index, owner=""), begun=group.begun)
            self._free.append((group.admission_index, ticket))
        heapq.heapify(self._free)

    @property
    def next_group(self) -> int:
        """Return the number of the next new prompt."""
        return self._next_group

    @property
    def num_given_back(self) -> int:
        """Number of admitted groups that no actor holds."""
        return sum(ticket is not None for _, ticket in self._free) + len(self._suspects)

    def num_admissible(self, published_version: int | None, owner: str) -> int:
        """Return how many tickets `owner` may draw now."""
        num_fresh = 0
        if published_version is not None:
            num_steps = published_version + self._config.max_policy_lag + 1
            limit = min(self._num_groups, num_steps * self._config.groups_per_step)
            num_fresh = max(0, limit - self._next_index)
        return len(self._free) + num_fresh + self._may_have_suspect(owner)

    def _may_have_suspect(self, owner: str) -> bool:
        """Return whether `owner` may draw a suspected group: one at a time, to identify the one that kills."""
        return bool(self._suspects) and owner not in self._on_trial

    def _is_suspect(self, ticket: Ticket) -> bool:
        return len(self._deaths.get(ticket.group, ())) >= SUSPECT_DEATHS

    def draw(self, owner: str, num: int) -> list[Ticket]:
        """Return the next `num` tickets for `owner`; `num` must not exceed `num_admissible`."""
        tickets: list[Ticket] = []
        if num and self._may_have_suspect(owner):
            ticket = heapq.heappop(self._suspects)[1]
            assert ticket is not None
            self._on_trial[owner] = ticket.group
            tickets.append(replace(ticket, owner=owner))
        while len(tickets) < num:
            tickets.append(self._next(owner))
        return tickets

    def _next(self, owner: str) -> Ticket:
        if self._free:
            index, ticket = heapq.heappop(self._free)
            if ticket is not None:
                return replace(ticket, owner=owner)
        else:
            index = self._next_index
            self._next_index += 1
        group = self._next_group
        self._next_group += 1
        return self._ticket(group, index, owner)

    def _ticket(self, group: int, index: int, owner: str) -> Ticket:
        before = index // self._config.groups_per_step
        task, row = self._order.prompt(group)
        floor, num_steps = (
            max(0, before - self._config.max_policy_lag),
            self._num_groups // self._config.groups_per_step,
        )
        return Ticket(
            group, index, floor, self._run_seed, row, owner, task=task, num_steps_before=before, num_steps=num_steps
        )

    def give_back(self, ticket: Ticket) -> None:
        """Return a group for another actor to finish, under the same floor."""
        self._end_trial(ticket)
        heapq.heappush(self._suspects if self._is_suspect(ticket) else self._free, (ticket.admission_index, ticket))

    def void(self, ticket: Ticket) -> None:
        """Void a group: the next prompt takes its place in training."""
        self._end_trial(ticket)
        self._deaths.pop(ticket.group, None)
        heapq.heappush(self._free, (ticket.admission_index, None))

    def finished(self, ticket: Ticket) -> None:
        """Record that a group is finished and no longer suspected."""
        self._end_trial(ticket)
        self._deaths.pop(ticket.group, None)

    def _end_trial(self, ticket: Ticket) -> None:
        if self._on_trial.get(ticket.owner) == ticket.group:
            del self._on_trial[ticket.owner]

    def died(self, owner: str, held: Collection[Ticket]) -> Ticket | None:
        """Record that `owner` died holding these groups. Returns the only suspected one, else None."""
        for ticket in held:
            self._deaths[ticket.group] = (*self._deaths.get(ticket.group, ()), owner)
        suspects = [ticket for ticket in held if self._is_suspect(ticket)]
        return suspects[0] if len(suspects) == 1 else None

    def deaths(self, ticket: Ticket) -> tuple[str, ...]:
        """Return the actors that died while holding this group."""
        return self._deaths.get(ticket.group, ())
