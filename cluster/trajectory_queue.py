"""Admission, numbering and hand-out of groups: the queue that bounds policy lag by construction.

Group i is trained in step i // B + 1, admitted once version i // B - L is published, and carries that version as its
floor. A group that cannot be finished is voided and the next prompt takes its number and floor, so that always
admitted = trained + void + open. Where it is given a recorder, everything it decides is recorded, and what was sampled
and scored is on the disk before a step can take it. Knows neither engines nor rewards.
"""

from __future__ import annotations

import asyncio
import heapq
import math
import random
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from cluster import records
from cluster.config import TrajectoryQueueConfig
from cluster.errors import DeadlineExceeded, TrajectoryRefused
from cluster.trajectory import FinishedGroup, Ticket, Trajectory


@dataclass(frozen=True, slots=True)
class QueuePosition:
    """Where a run stands in its data: what a checkpoint stores and a resumed queue starts from."""

    num_trained: int = 0
    num_void: int = 0

    @property
    def next_group(self) -> int:
        """The number of the next prompt that is admitted."""
        return self.num_trained + self.num_void


@dataclass(frozen=True, slots=True)
class QueueCounts:
    """The ledger, in groups: num_admitted = num_trained + num_void + num_open."""

    num_admitted: int
    num_trained: int
    num_void: int
    num_open: int


class PromptOrder:
    """Which data row prompt number g is: a seeded permutation of the rows an epoch, never the order of arrival."""

    def __init__(self, rows: Sequence[Mapping[str, Any]], seed: int) -> None:
        self._rows = rows
        self._seed = seed
        self._epoch = -1
        self._permutation: list[int] = []

    def row(self, group: int) -> Mapping[str, Any]:
        epoch, place = divmod(group, len(self._rows))
        if epoch != self._epoch:
            self._permutation = list(range(len(self._rows)))
            random.Random(f"prompts:{self._seed}:{epoch}").shuffle(self._permutation)
            self._epoch = epoch
        return self._rows[self._permutation[place]]


class KeepsRecords(Protocol):
    """The recorder, as the queue sees it."""

    def record(self, records: Sequence[records.Record]) -> Awaitable[None]:
        """Take these records in this order and return when they are on the disk."""


class TrajectoryQueue:
    """Admits prompts, collects their groups and hands each step its groups in admission order."""

    def __init__(
        self,
        config: TrajectoryQueueConfig,
        rows: Sequence[Mapping[str, Any]],
        *,
        run_seed: int,
        num_steps: int,
        position: QueuePosition = QueuePosition(),
        recorder: KeepsRecords | None = None,
    ) -> None:
        self._config = config
        self._order = PromptOrder(rows, run_seed)
        self._run_seed = run_seed
        self._recorder = recorder
        self._num_groups = num_steps * config.groups_per_step
        self._num_trained = position.num_trained
        self._num_void = position.num_void
        self._next_group = position.next_group
        self._next_index = position.num_trained
        self._published_version: int | None = None
        self._reopened: list[tuple[int, Ticket | None]] = []
        self._open: dict[int, Ticket] = {}
        self._arriving: dict[int, Ticket] = {}
        self._ready: dict[int, list[Trajectory]] = {}
        self._gone: set[str] = set()
        self._num_asking = 0
        self._voided: list[tuple[int, str]] = []
        self._changed = asyncio.Condition()

    async def admit(self, owner: str, *, max_groups: int, timeout_s: float) -> list[Ticket]:
        """The next admissible prompts, now held by `owner`; woken by `published`, `void` and `hand_over`.

        At most `max_groups`, and no more than an equal share among those who are asking. Empty when nothing became
        admissible within `timeout_s`, and to an owner whose groups were handed over meanwhile.
        """
        self._gone.discard(owner)
        self._num_asking += 1
        try:
            async with self._changed:
                await self._wait(lambda: self._num_admissible() > 0, timeout_s)
                if owner in self._gone:
                    return []
                share = math.ceil(self._num_admissible() / self._num_asking)
                first_new = self._next_group
                tickets = [self._draw(owner) for _ in range(min(share, max_groups))]
                new = [records.admit(ticket) for ticket in tickets if ticket.group >= first_new]
                await self._record(new)
                self._open.update({ticket.admission_index: ticket for ticket in tickets})
                return tickets
        finally:
            self._num_asking -= 1

    def _num_admissible(self) -> int:
        num_fresh = 0
        if self._published_version is not None:
            num_steps = self._published_version + self._config.max_policy_lag + 1
            limit = min(self._num_groups, num_steps * self._config.groups_per_step)
            num_fresh = max(0, limit - self._next_index)
        return len(self._reopened) + num_fresh

    def _floor(self, index: int) -> int:
        return max(0, index // self._config.groups_per_step - self._config.max_policy_lag)

    def _draw(self, owner: str) -> Ticket:
        if self._reopened:
            index, ticket = heapq.heappop(self._reopened)
            if ticket is not None:
                return replace(ticket, owner=owner)
        else:
            index = self._next_index
            self._next_index += 1
        group = self._next_group
        self._next_group += 1
        return Ticket(group, index, self._floor(index), self._run_seed, self._order.row(group), owner)

    async def _record(self, new: Sequence[records.Record]) -> None:
        """Have it recorded. Raises DeadlineExceeded where that takes longer than a step may wait for its groups."""
        if self._recorder is None or not new:
            return
        timeout_s = self._config.take_timeout_s
        try:
            await asyncio.wait_for(self._recorder.record(new), timeout_s)
        except TimeoutError as error:
            raise DeadlineExceeded("trajectory_queue", f"waited {timeout_s:g} s for the recorder") from error

    async def put(self, groups: Sequence[FinishedGroup]) -> None:
        """Hand in finished groups: all of them, or none and TrajectoryRefused where the owner no longer holds one or
        a record is bad. Returns when they are recorded; until then they are nobody's to hand over."""
        async with self._changed:
            for ticket, trajectories in groups:
                self._require_held(ticket)
                for trajectory in trajectories:
                    self._check(ticket, trajectory)
            for ticket, _ in groups:
                self._arriving[ticket.admission_index] = self._open.pop(ticket.admission_index)
        try:
            finished = [t for _, trajectories in groups for t in trajectories]
            await self._record([record for trajectory in finished for record in records.finished(trajectory)])
        except BaseException:
            await self._arrived(groups, reopened=True)
            raise
        await self._arrived(groups, reopened=False)

    async def _arrived(self, groups: Sequence[FinishedGroup], *, reopened: bool) -> None:
        """Groups are recorded and wait for their step, or are not and fall free for others."""
        async with self._changed:
            for ticket, trajectories in groups:
                index = ticket.admission_index
                held = self._arriving.pop(index)
                if reopened:
                    heapq.heappush(self._reopened, (index, held))
                else:
                    self._ready[index] = list(trajectories)
            self._changed.notify_all()

    def _require_held(self, ticket: Ticket) -> None:
        held = self._open.get(ticket.admission_index)
        if held is None or (held.owner, held.group) != (ticket.owner, ticket.group):
            holder = held.owner if held else "nobody"
            raise TrajectoryRefused(ticket.uid(0), f"{ticket.owner} no longer holds this group ({holder} does)")

    def _check(self, ticket: Ticket, trajectory: Trajectory) -> None:
        trajectory.check()
        if (trajectory.group, trajectory.admission_index) != (ticket.group, ticket.admission_index):
            raise TrajectoryRefused(trajectory.uid, f"does not belong to group {ticket.group}")
        if trajectory.reward is None:
            raise TrajectoryRefused(trajectory.uid, "has no reward")
        for segment in trajectory.segments:
            if segment.length and segment.policy_version < ticket.min_policy_version:
                raise TrajectoryRefused(
                    trajectory.uid,
                    f"sampled with version {segment.policy_version}, older than its floor {ticket.min_policy_version}",
                )
            if self._published_version is None or segment.policy_version > self._published_version:
                raise TrajectoryRefused(trajectory.uid, f"version {segment.policy_version} is not published yet")

    async def void(self, ticket: Ticket, reason: str) -> None:
        """Give a group up; the next prompt takes its number and its floor."""
        async with self._changed:
            self._require_held(ticket)
            await self._record([records.void(ticket, reason)])
            del self._open[ticket.admission_index]
            self._num_void += 1
            self._voided.append((ticket.group, reason))
            heapq.heappush(self._reopened, (ticket.admission_index, None))
            self._changed.notify_all()

    async def hand_over(self, owner: str) -> list[int]:
        """Take back every group `owner` holds, for others to finish under the same floor; returns their numbers."""
        async with self._changed:
            self._gone.add(owner)
            indices = sorted(index for index, ticket in self._open.items() if ticket.owner == owner)
            for index in indices:
                heapq.heappush(self._reopened, (index, self._open.pop(index)))
            self._changed.notify_all()
            return indices

    async def declare_dead(self, owner: str) -> list[int]:
        """Hand over what `owner` holds, and have nothing recorded any more that it sends."""
        await self._record([records.fence(owner)])
        return await self.hand_over(owner)

    async def take(self, step: int) -> list[list[Trajectory]]:
        """The groups of `step` in admission order; waits for the rollout actors' `put`.

        Raises DeadlineExceeded naming the missing groups and who holds them.
        """
        first = (step - 1) * self._config.groups_per_step
        indices = range(first, first + self._config.groups_per_step)
        async with self._changed:
            await self._wait(lambda: all(i in self._ready for i in indices), self._config.take_timeout_s)
            missing = [i for i in indices if i not in self._ready]
            if missing:
                raise DeadlineExceeded("trajectory_queue", self._missing(step, missing))
            self._num_trained += len(indices)
            groups = [self._ready.pop(i) for i in indices]
        return [[replace(t, step=step) for t in group] for group in groups]

    def _missing(self, step: int, missing: list[int]) -> str:
        held = self._open | self._arriving
        holders = {i: held[i].owner if i in held else "nobody" for i in missing[:8]}
        names = ", ".join(f"group {i} (held by {holder})" for i, holder in holders.items())
        return f"step {step} waited {self._config.take_timeout_s:g} s for {len(missing)} groups: {names}"

    async def published(self, version: int) -> None:
        """Version `version` is published; wakes actors whose next group it admits."""
        async with self._changed:
            self._published_version = version
            self._changed.notify_all()

    async def counts(self) -> QueueCounts:
        """The ledger now. Groups waiting in the queue, held by an actor or between actors are open."""
        num_held = len(self._open) + len(self._arriving) + len(self._ready)
        num_open = num_held + sum(ticket is not None for _, ticket in self._reopened)
        num_admitted = self._num_trained + self._num_void + num_open
        return QueueCounts(num_admitted, self._num_trained, self._num_void, num_open)

    async def voided(self) -> list[tuple[int, str]]:
        """Every voided group with its reason."""
        return list(self._voided)

    async def _wait(self, ready: Callable[[], bool], timeout_s: float) -> None:
        try:
            await asyncio.wait_for(self._changed.wait_for(ready), timeout_s)
        except TimeoutError:
            return
