"""Define the records about groups that queue, journal and ring exchange."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from cluster.trajectory import PartialResponse, Trajectory


@dataclass(frozen=True, slots=True)
class PendingGroup:
    """A group that was admitted and is not finished; `begun` are its saved partial responses."""

    group: int
    admission_index: int
    begun: tuple[PartialResponse, ...] = ()


@dataclass(frozen=True, slots=True)
class ResumePoint:
    """The state from which a queue resumes a run.

    `vacant` are admission indices whose group was voided and not replaced; `ready` are finished groups that wait for
    their step. `num_resampled` of the void groups had equal rewards; `resampled` counts them by admission index.
    """

    num_trained: int = 0
    num_void: int = 0
    next_group: int = 0
    next_index: int = 0
    vacant: tuple[int, ...] = ()
    open: tuple[PendingGroup, ...] = ()
    ready: tuple[tuple[Trajectory, ...], ...] = ()
    num_resampled: int = 0
    resampled: Mapping[int, int] = field(default_factory=dict)

    @classmethod
    def at(cls, num_trained: int, num_void: int, num_resampled: int = 0) -> ResumePoint:
        """Return the point after `num_trained` groups were trained and `num_void` voided, with none open."""
        return cls(num_trained, num_void, num_trained + num_void, num_trained, num_resampled=num_resampled)


@dataclass(frozen=True, slots=True)
class QueueCounts:
    """The ledger, in groups: num_admitted = num_trained + num_void + num_open.

    `num_resampled` of the void groups had equal rewards and were replaced by other prompts.
    """

    num_admitted: int
    num_trained: int
    num_void: int
    num_open: int
    num_resampled: int = 0
