"""Where a learner's model comes from. Imports neither torch nor ray."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Place:
    """Paths, dtype and seed of a learner.

    `dtype` is that of the computation, trained weights are kept in float32.

    `reference_path` is the reference policy (default: `model_path`), `critic_path` the reward model that a critic may
    start from, `checkpoint_path` the checkpoint to resume from. Without `log_dir` ranks write to the driver's output.
    """

    model_path: Path
    dtype: str = "float32"
    seed: int = 0
    log_dir: Path | None = None
    reference_path: Path | None = None
    critic_path: Path | None = None
    checkpoint_path: Path | None = None

    @property
    def reference(self) -> Path:
        """The folder of the reference policy."""
        return self.reference_path or self.model_path
