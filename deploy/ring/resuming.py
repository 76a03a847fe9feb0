"""Where a run goes on from: its newest checkpoint, and what its log says happened since.

The steps since the checkpoint are trained again from the log, in the same order and unseen by anyone; then the run goes
on as if it had never stopped: what was finished waits for its step, what was begun goes on from its closed segments.
Knows neither engines nor PPO.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from cluster.journal.history import History
from cluster.ledger import ResumePoint
from deploy.config.schema import RunConfig
from deploy.run.directory import RunDirectory, checkpoint_step
from deploy.run.layout import RECORDS

POSITION = "position.json"
"""In a checkpoint: how many groups were trained and voided, for a run whose log is gone."""


@dataclass(frozen=True, slots=True)
class Resumption:
    """The `checkpoint`, which holds version `kept`; the last step that was trained; and where the data stands then.

    `lengths`: how many steps the run was to have from which version on, this time included.
    """

    checkpoint: Path | None
    kept: int
    trained: int
    standing: ResumePoint
    lengths: tuple[tuple[int, int], ...]
    history: History | None = None

    def story(self) -> str | None:
        """What the run goes on from, takes over and does again, in words; None where it begins."""
        if self.trained == 0 and not self.standing.next_group:
            return None
        origin = f"checkpoint step {self.kept}" if self.checkpoint else "the start"
        num_again, num_ready, num_open = self.trained - self.kept, len(self.standing.ready), len(self.standing.open)
        num_tokens = sum(len(response.token_ids) for group in self.standing.open for response in group.begun)
        parts = [f"ppo: goes on from {origin}"]
        if num_again:
            parts.append(f"trains {_steps(self.kept + 1, self.trained)} again from the log")
        if num_ready:
            parts.append(f"takes over {num_ready:,} finished groups")
        if num_open:
            parts.append(f"goes on with {num_open:,} groups under way ({num_tokens:,} tokens)")
        return "; ".join(parts)


def _steps(first: int, last: int) -> str:
    return f"step {first}" if first == last else f"steps {first} to {last}"


def resumption(run: RunDirectory, config: RunConfig, checkpoint: Path | None) -> Resumption:
    """Where the run goes on. Nobody may write to its log meanwhile. Raises RecorderError where the log is damaged.

    A run whose log is gone goes on from its checkpoint alone.
    """
    kept = checkpoint_step(checkpoint) if checkpoint else 0
    history = History(run.path / RECORDS)
    trained = max(history.steps, default=0)
    if checkpoint is not None and trained < kept:
        position = json.loads((checkpoint / POSITION).read_text())
        standing = ResumePoint.at(position["num_trained"], position["num_void"])
        return Resumption(checkpoint, kept, kept, standing, ((kept, config.learner.num_steps),))
    standing = history.standing(config.rollout_actors.responses_per_prompt)
    before = tuple((version, num) for version, num in history.lengths if version < trained)
    return Resumption(checkpoint, kept, trained, standing, (*before, (trained, config.learner.num_steps)), history)
