"""The settings of each time of a run, read from its journal."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.errors import InputError
from cluster.journal import events
from cluster.journal.files import LogFile
from cluster.journal.history import History
from deploy.config.schema import RunConfig
from deploy.ring.phases import phases_of, recorded_settings, resumed_phases, with_changes

FIRST = RunConfig.model_validate({"learner": {"clip": 0.2, "micro_batch_tokens": 4096}})
SECOND = RunConfig.model_validate({"learner": {"clip": 0.1, "micro_batch_tokens": 1024}})


def history(folder: Path, *settings: str | None) -> History:
    log = LogFile(folder / "records-000000.arrows")
    starts = [
        events.start(f"run-{number}", version=2 * number, group=0, num_steps=9, settings=text)
        for number, text in enumerate(settings)
    ]
    log.append([{"number": number, "time_s": 0.0, **record} for number, record in enumerate(starts)])
    log.close()
    return History(folder)


def test_each_time_has_its_settings(tmp_path: Path) -> None:
    found = history(tmp_path, FIRST.model_dump_json(), SECOND.model_dump_json())
    phases = phases_of(recorded_settings(found), SECOND)
    assert [(phase.version, phase.config.clip) for phase in phases] == [(0, 0.2), (2, 0.1)]


def test_settings_that_never_changed_need_no_phases(tmp_path: Path) -> None:
    found = history(tmp_path, FIRST.model_dump_json(), FIRST.model_dump_json())
    assert phases_of(recorded_settings(found), FIRST) == ()
    assert len(phases_of(recorded_settings(found), SECOND)) == 2, "config.toml changed after the last step"


def test_a_journal_without_settings_has_no_phases(tmp_path: Path) -> None:
    assert recorded_settings(history(tmp_path, None)) == []


def test_repeated_steps_have_their_settings_and_todays_memory(tmp_path: Path) -> None:
    phases = resumed_phases(history(tmp_path, FIRST.model_dump_json()), SECOND, trained=3)
    assert [(p.version, p.config.clip, p.config.micro_batch_tokens) for p in phases] == [(0, 0.2, 1024), (3, 0.1, 1024)]


def test_what_if_changes_the_settings_of_every_time(tmp_path: Path) -> None:
    found = recorded_settings(history(tmp_path, FIRST.model_dump_json(), SECOND.model_dump_json()))
    now = SECOND.model_copy(update={"learner": SECOND.learner.model_copy(update={"gamma": 0.5})})
    changed = with_changes(found, SECOND, now)
    assert [(c.learner.gamma, c.learner.clip) for _, c in changed] == [(0.5, 0.2), (0.5, 0.1)]


def test_settings_that_cannot_be_read_are_refused_by_version(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"settings after version 0 cannot be read: learner\.unknown"):
        recorded_settings(history(tmp_path, '{"learner": {"unknown": 1}}'))
