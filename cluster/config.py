"""Define the base of the run file's sections, and the section of the trajectory queue.

`deploy.config.load` reads the file. Imports neither torch nor ray, so that `antiphon check` starts fast.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.fields import FieldInfo

MayChange = Literal["always", "recorded", "higher", "never"]
"""Whether a setting may change when a run resumes.

`always`: what is trained does not depend on it. `recorded`: with `--allow-changes`; the journal records the step from
which the new value holds. `higher`: only to a higher value. `never`: it would be a different run.
"""


class Section(BaseModel):
    """One table of the run file: frozen; rejects unknown keys; the string under a field is its help."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


def setting(
    default: Any,
    *,
    may_change: MayChange,
    reevaluates: bool = False,
    keys: Mapping[str, MayChange] | None = None,
    **constraints: Any,
) -> Any:
    """Return a field of a section; a `default` of `...` makes it required.

    If `reevaluates`, a change repeats the evaluations. `keys` sets `may_change` for single keys of a free table.
    """
    extra: dict[str, Any] = {"may_change": may_change}
    if reevaluates:
        extra["reevaluates"] = True
    if keys:
        extra["keys"] = dict(keys)
    return Field(default, json_schema_extra=extra, **constraints)


def mark_of(field: FieldInfo) -> dict[str, Any]:
    """Return what `setting` recorded about a field; a field without it may never change."""
    extra = field.json_schema_extra
    return extra if isinstance(extra, dict) and "may_change" in extra else {"may_change": "never"}


class TrajectoryQueueConfig(Section):
    """How groups are numbered, admitted and handed to the learner."""

    groups_per_step: int = setting(32, may_change="never", ge=1)
    """Groups (prompts with all their responses) trained in one step."""
    max_policy_lag: int = setting(1, may_change="never", ge=0)
    """Maximum age of a trained token in policy versions; 0 is synchronous PPO."""
    max_void_share: float = setting(0.02, may_change="always", ge=0, le=1)
    """Share of the groups that may be voided, because they cannot be scored or kill their actor. If more are, the run
    ends with the reason of the last one. One step's number of groups is always allowed; 0 allows none."""
    take_timeout_s: float = setting(600.0, may_change="always", gt=0)
    """How long a step waits for its groups before the run ends and names the actors that hold them."""
