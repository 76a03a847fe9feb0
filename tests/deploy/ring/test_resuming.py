"""Where a run resumes, according to its journal and its newest checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster.journal import events
from cluster.journal.events import Record
from cluster.journal.files import LogFile
from cluster.ledger import ResumePoint
from deploy.config.schema import RunConfig
from deploy.ring.resuming import POSITION, Resumption, resumption
from deploy.run.directory import RunDirectory
from deploy.run.layout import RECORDS
from tests.cluster.journal.test_history import BEGIN, trained
from tests.cluster.journal.test_recorder import manifest, recorded, ticket

CONFIG = RunConfig.model_validate({"model": {"path": "m"}, "rollout_actors": {"responses_per_prompt": 1}})


def resumed(path: Path, *records: Record, checkpoint: Path | None = None) -> Resumption:
    (path / RECORDS).mkdir()
    log = LogFile(path / RECORDS / "records-000000.arrows")
    log.append([{"number": number, "time_s": 0.0, **record} for number, record in enumerate(records)])
    log.close()
    return resumption(RunDirectory(path), CONFIG, checkpoint)


THREE_STEPS = (
    *(BEGIN, events.publish(manifest(0)), *recorded(0), *recorded(1), *recorded(2), *recorded(3)),
    *(*trained(1, 0), events.publish(manifest(1)), *trained(2, 1), events.publish(manifest(2)), *trained(3, 2)),
    events.admit(ticket(4)),
)


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    checkpoint = tmp_path / "checkpoints" / "ppo" / "step-000001"
    checkpoint.mkdir(parents=True)
    return checkpoint


def test_a_new_run_has_no_summary(tmp_path: Path) -> None:
    (tmp_path / RECORDS).mkdir()
    new = resumption(RunDirectory(tmp_path), CONFIG, None)
    assert (new.kept, new.trained, new.standing, new.summary()) == (0, 0, ResumePoint(), None)
    assert new.lengths == ((0, CONFIG.learner.num_steps),)


def test_the_summary_names_repeated_steps_and_kept_groups(tmp_path: Path, kept: Path) -> None:
    resuming = resumed(tmp_path, *THREE_STEPS, checkpoint=kept)
    assert (resuming.kept, resuming.trained, resuming.standing.num_trained) == (1, 3, 3)
    assert resuming.lengths == ((0, 4), (3, CONFIG.learner.num_steps))
    assert resuming.summary() == (
        "ppo: resumes from checkpoint step 1; trains steps 2 to 3 again from the journal; keeps 1 finished groups; "
        "continues 1 unfinished groups (0 tokens)"
    )


def test_a_run_resumes_from_its_checkpoint_if_its_journal_is_lost(tmp_path: Path, kept: Path) -> None:
    (kept / POSITION).write_text(json.dumps({"num_trained": 8, "num_void": 1}))
    resuming = resumed(tmp_path, BEGIN, checkpoint=kept)
    assert (resuming.kept, resuming.trained, resuming.standing) == (1, 1, ResumePoint.at(8, 1))
