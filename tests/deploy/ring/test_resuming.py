"""Where a run goes on: what its log and its newest checkpoint say, and what is trained, and published, again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.journal import events
from cluster.journal.events import Record
from cluster.journal.files import LogFile
from cluster.ledger import ResumePoint
from cluster.trajectory import Trajectory
from cluster.weights.manifest import Manifest
from deploy.config.schema import RunConfig
from deploy.ring.calls import PublishedOnce, RecordedFirst
from deploy.ring.resuming import POSITION, Resumption, resumption
from deploy.run.directory import RunDirectory
from deploy.run.layout import RECORDS
from tests.cluster.journal.test_history import BEGIN, trained
from tests.cluster.journal.test_recorder import manifest, ticket, told, trajectory

CONFIG = RunConfig.model_validate({"model": {"path": "m"}, "rollout_actors": {"responses_per_prompt": 1}})


def resumed(path: Path, *told: Record, checkpoint: Path | None = None) -> Resumption:
    (path / RECORDS).mkdir()
    log = LogFile(path / RECORDS / "records-000000.arrows")
    log.append([{"number": number, "time_s": 0.0, **record} for number, record in enumerate(told)])
    log.close()
    return resumption(RunDirectory(path), CONFIG, checkpoint)


THREE_STEPS = (
    *(BEGIN, events.publish(manifest(0)), *told(0), *told(1), *told(2), *told(3)),
    *(*trained(1, 0), events.publish(manifest(1)), *trained(2, 1), events.publish(manifest(2)), *trained(3, 2)),
    events.admit(ticket(4)),
)


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    checkpoint = tmp_path / "checkpoints" / "ppo" / "step-000001"
    checkpoint.mkdir(parents=True)
    return checkpoint


def test_a_run_that_begins_has_no_story(tmp_path: Path) -> None:
    (tmp_path / RECORDS).mkdir()
    begins = resumption(RunDirectory(tmp_path), CONFIG, None)
    assert (begins.kept, begins.trained, begins.standing, begins.story()) == (0, 0, ResumePoint(), None)
    assert begins.lengths == ((0, CONFIG.learner.num_steps),)


def test_the_steps_since_the_checkpoint_are_told_and_what_is_taken_over(tmp_path: Path, kept: Path) -> None:
    goes_on = resumed(tmp_path, *THREE_STEPS, checkpoint=kept)
    assert (goes_on.kept, goes_on.trained, goes_on.standing.num_trained) == (1, 3, 3)
    assert goes_on.lengths == ((0, 4), (3, CONFIG.learner.num_steps))
    assert goes_on.story() == (
        "ppo: goes on from checkpoint step 1; trains steps 2 to 3 again from the log; takes over 1 finished groups; "
        "goes on with 1 groups under way (0 tokens)"
    )


def test_a_run_whose_log_is_gone_goes_on_from_its_checkpoint_alone(tmp_path: Path, kept: Path) -> None:
    (kept / POSITION).write_text(json.dumps({"num_trained": 8, "num_void": 1}))
    goes_on = resumed(tmp_path, BEGIN, checkpoint=kept)
    assert (goes_on.kept, goes_on.trained, goes_on.standing) == (1, 1, ResumePoint.at(8, 1))


async def test_steps_that_were_trained_come_from_the_log_and_others_from_the_queue(tmp_path: Path, kept: Path) -> None:
    class Queue:
        async def take(self, step: int) -> list[list[Trajectory]]:
            return [[trajectory(step)]]

    queue = RecordedFirst(Queue(), resumed(tmp_path, *THREE_STEPS, checkpoint=kept))
    assert await queue.take(2) == [[replace(trajectory(1), step=2)]]
    assert await queue.take(3) == [[replace(trajectory(2), step=3)]]
    assert await queue.take(4) == [[trajectory(4)]]


async def test_versions_published_before_are_compared_and_not_published_again(tmp_path: Path, kept: Path) -> None:
    published, notes = list[int](), list[str]()

    class Weights:
        async def publish(self, manifest: Manifest) -> None:
            published.append(manifest.version)

    weights = PublishedOnce(Weights(), resumed(tmp_path, *THREE_STEPS, checkpoint=kept), notes.append)
    other = replace(manifest(2).tensors[0], checksum="another")
    for again in (manifest(1), replace(manifest(2), tensors=(other,)), manifest(3), manifest(4)):
        await weights.publish(again)
    assert published == [3, 4]
    assert notes == ["ppo: version 2 trained again differs in 1 of 1 tensors from what was published"]
