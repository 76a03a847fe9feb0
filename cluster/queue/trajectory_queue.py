"""Admit, number and hand out groups: the queue that bounds policy lag by construction.

Group i is trained in step i // B + 1, admitted once version i // B - L is published, and carries that version as its
floor. If a group cannot be finished, it is voided and the next prompt takes its number and floor, so that always
admitted = trained + void + open. If the queue has a recorder, every decision is recorded, and a group is on the disk
before a step can take it.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import replace
from typing import Protocol

from cluster.config import TrajectoryQueueConfig
from cluster.data.prompt_order import TaskPrompts
from cluster.errors import DeadlineExceeded, GroupsVoided, TrajectoryRefused
from cluster.journal import events
from cluster.ledger import QueueCounts, ResumePoint
from cluster.queue.admission import Admission
from cluster.queue.resampling import Resampling
from cluster.trajectory import FinishedGroup, PartialGroup, PartialResponse, Ticket, Trajectory


class KeepsRecords(Protocol):
    """The recorder's interface for the queue."""

    def record(self, records: Sequence[events.Record]) -> Awaitable[None]:
        """Append these records in this order; returns when they are on the disk."""


class TrajectoryQueue:
    """Admits prompts, collects their groups and hands each step its groups in admission order.

    await queue.published(0)                                              # the ring
    (ticket,) = await queue.admit("rollout-0", max_groups=1, timeout_s=1)  # a rollout actor
    await queue.put([(ticket, trajectories)])
    groups = await queue.take(1)                                          # the training loop
    """

    def __init__(
        self,
        config: TrajectoryQueueConfig,
        prompts: Sequence[TaskPrompts],
        *,
        run_seed: int,
        num_steps: int,
        standing: ResumePoint = ResumePoint(),
        recorder: KeepsRecords | None = None,
        max_resamples: int = 0,
    ) -> None:
        self._config = config
        self._recorder = recorder
        self._admission = Admission(config, prompts, run_seed=run_seed, num_steps=num_steps, standing=standing)
        self._num_trained = standing.num_trained
        self._num_void = standing.num_void
        self._resampling = Resampling(max_resamples, num_before=standing.num_resampled, by_place=standing.resampled)
        self._published_version: int | None = None
        self._open: dict[int, Ticket] = {}
        self._arriving: dict[int, Ticket] = {}
        self._ready = {group[0].admission_index: list(group) for group in standing.ready}
        self._keeping: dict[str, set[asyncio.Future[None]]] = {}
        self._gone: set[str] = set()
        self._dead: set[str] = set()
        self._num_asking = 0
        self._voided: list[tuple[str, str]] = []
        self._changed = asyncio.Condition()

    async def admit(self, owner: str, *, max_groups: int, timeout_s: float) -> list[Ticket]:
        """Return the next admissible prompts, now held by `owner`; woken by `published`, `put`, `void` and `hand_over`.

        At most `max_groups`, and at most an equal share among the waiting callers. Returns none if nothing became
        admissible within `timeout_s`, or if the owner's groups were handed over meanwhile. Raises TrajectoryRefused if
        the owner was declared dead.
        """
        self._require_alive(owner)
        self._gone.discard(owner)
        self._num_asking += 1
        try:
            async with self._changed:
                await self._wait(lambda: self._num_admissible(owner) > 0, timeout_s)
                if owner in self._gone:
                    return []
                num = self._num_admissible(owner)
                first_new = self._admission.next_group
                share = min(math.ceil(num / self._num_asking), max_groups)
                tickets = self._admission.draw(owner, share)
                await self._record([events.admit(ticket) for ticket in tickets if ticket.group >= first_new])
                self._open.update({ticket.admission_index: ticket for ticket in tickets})
                return tickets
        finally:
            self._num_asking -= 1

    def _require_alive(self, owner: str) -> None:
        if owner in self._dead:
            raise TrajectoryRefused(owner, "was declared dead")

    def _num_admissible(self, owner: str) -> int:
        return self._admission.num_admissible(self._published_version, owner)

    def _held_by(self, owner: str) -> list[Ticket]:
        return [ticket for _, ticket in sorted(self._open.items()) if ticket.owner == owner]

    async def _record(self, new: Sequence[events.Record]) -> None:
        """Record events. Raises DeadlineExceeded if that takes longer than `take_timeout_s`."""
        if self._recorder is None or not new:
            return
        timeout_s = self._config.take_timeout_s
        try:
            await asyncio.wait_for(self._recorder.record(new), timeout_s)
        except TimeoutError as error:
            raise DeadlineExceeded("trajectory_queue", f"waited {timeout_s:g} s for the recorder") from error

    async def keep(self, owner: str, groups: Sequence[PartialGroup]) -> None:
        """Save finished segments of unfinished groups so that another actor can continue them.

        Returns when they are recorded. Ignores groups that `owner` no longer holds. Raises TrajectoryRefused if `owner`
        was declared dead.
        """
        self._require_alive(owner)
        kept = [group for group in groups if self._holder(group[0]) == owner]
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        keeping = self._keeping.setdefault(owner, set())
        keeping.add(done)
        try:
            await self._record([record for group in kept for record in events.begun(group)])
            for ticket, _, responses in kept:
                self._keep(ticket, responses)
        finally:
            keeping.discard(done)
            done.set_result(None)

    def _keep(self, ticket: Ticket, responses: Sequence[PartialResponse]) -> None:
        if self._holder(ticket) == ticket.owner:
            held = self._open[ticket.admission_index]
            begun = {response.uid: response for response in (*held.begun, *responses)}
            self._open[ticket.admission_index] = replace(held, begun=tuple(begun.values()))

    async def put(self, groups: Sequence[FinishedGroup]) -> None:
        """Accept all of these finished groups; returns when they are recorded. Until then no other actor gets them.

        Voids those that are to be resampled because their rewards are equal; the next prompt takes their place. Raises
        TrajectoryRefused, having accepted none, if the owner no longer holds one or a trajectory is invalid.
        """
        async with self._changed:
            for ticket, trajectories in groups:
                self._require_held(ticket)
                for trajectory in trajectories:
                    self._check(ticket, trajectory)
            for ticket, _ in groups:
                self._arriving[ticket.admission_index] = self._open.pop(ticket.admission_index)
        equal = {ticket.group for ticket, trajectories in groups if self._resampling.wants(ticket, trajectories)}
        try:
            kept = [t for ticket, trajectories in groups if ticket.group not in equal for t in trajectories]
            voided = [events.void(ticket, self._resampling.reason) for ticket, _ in groups if ticket.group in equal]
            await self._record([*(record for t in kept for record in events.finished(t)), *voided])
        except BaseException:
            await self._arrived(groups, reopened=True)
            raise
        await self._arrived(groups, equal=equal)

    async def _arrived(
        self, groups: Sequence[FinishedGroup], *, equal: Collection[int] = (), reopened: bool = False
    ) -> None:
        """Make recorded groups ready for their step, free the place of those whose number is in `equal`.

        If they are `reopened`, return all of them to the actors: they could not be recorded.
        """
        async with self._changed:
            for ticket, trajectories in groups:
                held = self._arriving.pop(ticket.admission_index)
                if reopened:
                    self._admission.give_back(held)
                elif ticket.group in equal:
                    self._num_void += 1
                    self._resampling.add(held)
                    self._admission.void(held)
                else:
                    self._admission.finished(held)
                    self._ready[ticket.admission_index] = list(trajectories)
            self._changed.notify_all()

    def _holder(self, ticket: Ticket) -> str:
        held = self._open.get(ticket.admission_index)
        return held.owner if held is not None and held.group == ticket.group else "no actor"

    def _require_held(self, ticket: Ticket) -> None:
        holder = self._holder(ticket)
        if holder != ticket.owner:
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
        """Void a group; the next prompt takes its number and its floor.

        Raises GroupsVoided if that makes more than `max_void_share` allows.
        """
        async with self._changed:
            self._require_held(ticket)
            await self._void(ticket, reason)

    async def _void(self, ticket: Ticket, reason: str) -> None:
        await self._record([events.void(ticket, reason)])
        del self._open[ticket.admission_index]
        self._num_void += 1
        self._voided.append((ticket.uid(0), reason))
        self._admission.void(ticket)
        self._changed.notify_all()
        share, num_resampled = self._config.max_void_share, self._resampling.num
        num_admitted, num_void = self._counts().num_admitted - num_resampled, self._num_void - num_resampled
        if not share or num_void > max(self._config.groups_per_step, share * num_admitted):
            what = f"{reason}; {num_void} of {num_admitted} groups voided (trajectory_queue.max_void_share)"
            raise GroupsVoided(ticket.uid(0), what)

    async def hand_over(self, owner: str) -> list[int]:
        """Requeue every group that `owner` holds, under the same floor; returns their admission indices."""
        await self._let_go(owner)
        async with self._changed:
            return self._give_back(owner)

    async def _let_go(self, owner: str) -> None:
        """Accept nothing more from `owner`, and wait until what it has sent is saved."""
        self._gone.add(owner)
        await asyncio.gather(*self._keeping.pop(owner, ()))

    def _give_back(self, owner: str) -> list[int]:
        held = self._held_by(owner)
        for ticket in held:
            self._admission.give_back(self._open.pop(ticket.admission_index))
        self._changed.notify_all()
        return [ticket.admission_index for ticket in held]

    async def declare_dead(self, owner: str) -> list[int]:
        """Requeue the groups of `owner` and reject everything that it sends from now on.

        If exactly one of its groups is suspected of killing actors, that group is voided.
        """
        self._dead.add(owner)
        await self._let_go(owner)
        await self._record([events.fence(owner)])
        async with self._changed:
            culprit = self._admission.died(owner, self._held_by(owner))
            if culprit is not None:
                killed = ", ".join(self._admission.deaths(culprit))
                await self._void(culprit, f"its prompt was under way at the death of {killed}")
            return self._give_back(owner)

    async def take(self, step: int) -> list[list[Trajectory]]:
        """Return the groups of `step` in admission order; waits for the rollout actors' `put`.

        Raises DeadlineExceeded naming the missing groups and the actors that hold them.
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
        holders = {i: held[i].owner if i in held else "no actor" for i in missing[:8]}
        names = ", ".join(f"group {i} (held by {holder})" for i, holder in holders.items())
        return f"step {step} waited {self._config.take_timeout_s:g} s for {len(missing)} groups: {names}"

    async def published(self, version: int) -> None:
        """Record that `version` is published; wakes actors that wait for groups that it admits."""
        async with self._changed:
            self._published_version = version
            self._changed.notify_all()

    async def counts(self) -> QueueCounts:
        """Return the current ledger. Groups that wait in the queue or are held by an actor count as open."""
        return self._counts()

    def _counts(self) -> QueueCounts:
        num_open = len(self._open) + len(self._arriving) + len(self._ready) + self._admission.num_given_back
        num_admitted = self._num_trained + self._num_void + num_open
        return QueueCounts(num_admitted, self._num_trained, self._num_void, num_open, self._resampling.num)

    async def voided(self) -> list[tuple[str, str]]:
        """Return (first uid, reason) of every group voided since this queue started, without resampled ones."""
        return list(self._voided)

    async def holders(self) -> dict[str, list[int]]:
        """Return the admission indices of the groups that each actor holds."""
        holders: dict[str, list[int]] = {}
        for index, ticket in sorted((self._open | self._arriving).items()):
            holders.setdefault(ticket.owner, []).append(index)
        return holders

    async def _wait(self, ready: Callable[[], bool], timeout_s: float) -> None:
        try:
            await asyncio.wait_for(self._changed.wait_for(ready), timeout_s)
        except TimeoutError:
            return
