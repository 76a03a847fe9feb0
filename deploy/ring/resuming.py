"""Finds where a run resumes: its newest checkpoint and what the journal holds after it.

The steps after the checkpoint are trained again from the journal, in the same order, without publishing them. Then the
run continues as if it had not stopped: finished groups wait for their step, unfinished groups continue from their
finished segments.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from cluster.journal.history import History
from cluster.ledger import ResumePoint
from deploy.config.schema import RunConfig
from deploy.ring.phases import resumed_phases
from deploy.run.directory import RunDirectory
from deploy.run.layout import RECORDS
from deploy.run.stages import checkpoint_step
from learner.ppo.schedule import Phase

POSITION = "position.json"
"""File in a checkpoint with the numbers of trained and voided groups, for a run whose journal is lost."""


@dataclass(frozen=True, slots=True)
class Resumption:
    """Where a run resumes: `checkpoint` holds version `kept`, `trained` is the last trained step of the journal.

    `standing` is the queue's state after that step. `lengths` are pairs (version, number of steps): the run's planned
    length from each version on, this command's included. `phases` are its settings from each version on, if they
    changed.
    """

    checkpoint: Path | None
    kept: int
    trained: int
    standing: ResumePoint
    lengths: tuple[tuple[int, int], ...]
    history: History | None = None
    phases: tuple[Phase, ...] = ()

    def summary(self) -> str | None:
        """Describe what the run resumes from and what it repeats; None for a new run."""
        if self.trained == 0 and not self.standing.next_group:
            return None
        origin = f"checkpoint step {self.kept}" if self.checkpoint else "the start"
        num_again, num_ready, num_open = self.trained - self.kept, len(self.standing.ready), len(self.standing.open)
        num_tokens = sum(len(response.token_ids) for group in self.standing.open for response in group.begun)
        parts = [f"ppo: resumes from {origin}"]
        if num_again:
            parts.append(f"trains {_steps(self.kept + 1, self.trained)} again from the journal")
        if num_ready:
            parts.append(f"keeps {num_ready:,} finished groups")
        if num_open:
            parts.append(f"continues {num_open:,} unfinished groups ({num_tokens:,} tokens)")
        return "; ".join(parts)


def _steps(first: int, last: int) -> str:
    return f"step {first}" if first == last else f"steps {first} to {last}"


def resumption(run: RunDirectory, config: RunConfig, checkpoint: Path | None) -> Resumption:
    """Return where the run resumes. No process may write to its journal meanwhile.

    A run whose journal is lost resumes from its checkpoint. Raises RecorderError if the journal is damaged.
    """
    kept = checkpoint_step(checkpoint) if checkpoint else 0
    history = History(run.path / RECORDS)
    trained = max(history.steps, default=0)
    if checkpoint is not None and trained < kept:
        position = json.loads((checkpoint / POSITION).read_text())
        num_resampled = position.get("num_resampled", 0)
        standing = ResumePoint.at(position["num_trained"], position["num_void"], num_resampled)
        return Resumption(checkpoint, kept, kept, standing, ((kept, config.learner.num_steps),))
    standing = history.standing(config.rollout_actors.responses_per_prompt)
    before = tuple((version, num) for version, num in history.lengths if version < trained)
    lengths = (*before, (trained, config.learner.num_steps))
    phases = resumed_phases(history, config, trained)
    return Resumption(checkpoint, kept, trained, standing, lengths, history, phases)
