"""Records that queue, journal and ring exchange about groups."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.trajectory import PartialResponse, Trajectory


@dataclass(frozen=True, slots=True)
class PendingGroup:
    """A group that was admitted and is to be finished."""

    group: int
    admission_index: int
    begun: tuple[PartialResponse, ...] = ()


@dataclass(frozen=True, slots=True)
class ResumePoint:
    """Where a run stands in its data, which a queue goes on from.

    `vacant` are the places in training whose group was voided and not replaced; `ready` are the groups that are
    finished and wait for their step.
    """

    num_trained: int = 0
    num_void: int = 0
    next_group: int = 0
    next_index: int = 0
    vacant: tuple[int, ...] = ()
    open: tuple[PendingGroup, ...] = ()
    ready: tuple[tuple[Trajectory, ...], ...] = ()

    @classmethod
    def at(cls, num_trained: int, num_void: int) -> ResumePoint:
        """So many groups trained and voided, and none open."""
        return cls(num_trained, num_void, num_trained + num_void, num_trained)


@dataclass(frozen=True, slots=True)
class QueueCounts:
    """The ledger, in groups: num_admitted = num_trained + num_void + num_open."""

    num_admitted: int
    num_trained: int
    num_void: int
    num_open: int
