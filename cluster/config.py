"""The base of every section of the run file, and the section of the trajectory queue.

Knows nothing of files: `deploy.config.load` reads TOML. Imports neither torch nor ray, so a check answers at once.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    """One table of the run file: frozen, unknown keys refused, the string under a field is its help."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class TrajectoryQueueConfig(Section):
    """How groups are numbered, admitted and handed to the learner."""

    groups_per_step: int = Field(default=32, ge=1)
    """Groups (prompts with all their responses) trained in one step."""
    max_policy_lag: int = Field(default=1, ge=0)
    """Upper bound of a trained token's age in policy versions; 0 is synchronous PPO."""
    max_void_share: float = Field(default=0.02, ge=0, le=1)
    """Share of the groups that may be voided, because they cannot be scored or kill their actor, before the run ends
    with the last one's reason; as many as a step has are allowed always. 0 ends it at the first."""
    take_timeout_s: float = Field(default=600.0, gt=0)
    """How long a step waits for its groups before the run ends naming who holds them."""
