"""The settings of each time of a run whose settings changed, read from its journal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from pydantic import ValidationError

from cluster.config import mark_of
from cluster.errors import InputError
from cluster.journal.history import History
from deploy.config.errors import input_error
from deploy.config.schema import RunConfig
from deploy.run.layout import RECORDS
from learner.config import LearnerConfig
from learner.ppo.schedule import Phase


class RecordedSettings(NamedTuple):
    """The settings in force after a version."""

    version: int
    config: RunConfig


def recorded_settings(history: History) -> list[RecordedSettings]:
    """Return the recorded settings, in order; none if the journal is older than their column."""
    return [RecordedSettings(version, _parsed(version, text)) for version, text in history.settings]


def _parsed(version: int, text: str) -> RunConfig:
    try:
        return RunConfig.model_validate_json(text)
    except ValidationError as error:
        problem = f"settings after version {version} cannot be read: {input_error(error, RunConfig)}"
        raise InputError(RECORDS, f"{problem} (use the version of Antiphon that wrote them)") from error


def phases_of(settings: Sequence[RecordedSettings], config: RunConfig) -> tuple[Phase, ...]:
    """Return a phase for each entry; none if all train as `config` does."""
    phases = tuple(Phase(version, c.learner, c.rollout_actors.temperature) for version, c in settings)
    same = (config.learner, config.rollout_actors.temperature)
    return phases if any(phase[1:] != same for phase in phases) else ()


def with_changes(settings: Sequence[RecordedSettings], before: RunConfig, now: RunConfig) -> list[RecordedSettings]:
    """Return the settings with the fields of `[learner]` in which `now` differs from `before`."""
    names = LearnerConfig.model_fields
    changed = {n: getattr(now.learner, n) for n in names if getattr(now.learner, n) != getattr(before.learner, n)}
    return [
        RecordedSettings(version, c.model_copy(update={"learner": c.learner.model_copy(update=changed)}))
        for version, c in settings
    ]


def resumed_phases(history: History, config: RunConfig, trained: int) -> tuple[Phase, ...]:
    """Return the phases of a run that resumes after step `trained` with the settings `config`.

    Steps before are repeated with their own settings, but with today's memory and timeouts.
    """
    before = [s for s in recorded_settings(history) if s.version < trained]
    today = [
        RecordedSettings(s.version, s.config.model_copy(update={"learner": _with_resources(s.config.learner, config)}))
        for s in before
    ]
    return phases_of([*today, RecordedSettings(trained, config)], config)


def _with_resources(learner: LearnerConfig, config: RunConfig) -> LearnerConfig:
    """Take the fields on which training does not depend from the current settings."""
    free = [name for name, field in LearnerConfig.model_fields.items() if mark_of(field)["may_change"] == "always"]
    return learner.model_copy(update={name: getattr(config.learner, name) for name in free})
