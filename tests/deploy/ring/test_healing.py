"""Restarts of the learner group: calls, notes and publications with fakes, bit-identity on a real Ray."""

from __future__ import annotations

import asyncio
import hashlib
import math
import signal
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from cluster.errors import DeadlineExceeded, LearnerDied, LearnerError, RecorderError
from cluster.journal import events
from cluster.journal.files import LogFile, next_path, read_log
from cluster.journal.history import History
from cluster.trajectory import Ticket, Trajectory, read_trajectories
from cluster.weights.manifest import Manifest, TensorEntry
from deploy.ring.healing import RestartingLearners
from deploy.run.directory import RunDirectory
from deploy.run.layout import RECORDS
from learner.config import LearnerConfig
from learner.place import Place
from learner.ppo.batch import make_batch
from learner.training_loop import Groups, StepResult
from tests.learner.conftest import make_trajectory, make_two_turn_trajectory, rank_process_ids, write_policy
from tests.support.processes import is_running

CONFIG = LearnerConfig(num_learners=2, num_epochs=2, num_minibatches=2, learning_rate=1e-3, num_cpus=0.1)
DIED = LearnerDied("learner-1", "its process died")
HUNG = DeadlineExceeded("learner group", "waited 5 s for 2 learners to finish step 3")


def groups_of(step: int, num: int = 8) -> list[list[Trajectory]]:
    """Return groups of two trajectories, one of them with two rewarded turns."""
    plain = [make_trajectory(i, version=step - 1, seed=step) for i in range(num - 1)]
    plain.append(make_two_turn_trajectory(num - 1, version=step - 2, seed=step))
    pairs = [plain[i : i + 2] for i in range(0, num, 2)]
    return [[replace(t, group=10 * step + i, step=step) for t in pair] for i, pair in enumerate(pairs)]


def record_step(run_path: Path, step: int, groups: Groups) -> None:
    """Write all journal records of a step to a new journal file."""
    folder = run_path / RECORDS
    folder.mkdir(exist_ok=True)
    records = []
    for group in groups:
        records.append(events.admit(Ticket(group[0].group, group[0].admission_index, 0, 0, {"prompt": ""}, "actor-0")))
        records += [record for trajectory in group for record in events.finished(trajectory)]
    records += events.train(step, groups)
    first = len(read_log(folder, ["number"]))
    log = LogFile(next_path(folder))
    log.append([{"number": first + place, "time_s": 0.0, **record} for place, record in enumerate(records)])
    log.close()


@dataclass
class FakeGroup:
    """A group with one tensor, whose checksum covers every trained uid; the next call raises the first of `fail`."""

    first_step: int = 1
    checkpoint: Path | None = None
    salt: str = ""
    incarnation: str = "first"
    fail: list[BaseException] = field(default_factory=list)
    trained: list[str] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    is_shut_down: bool = False

    def manifest(self, version: int) -> Manifest:
        text = self.salt + " ".join(self.trained)
        entry = TensorEntry("w", (1,), "float32", hashlib.sha256(text.encode()).hexdigest(), self)
        return Manifest(version, self.incarnation, (entry,), (), (), None)

    def may_fail(self) -> None:
        assert not self.is_shut_down
        if self.fail:
            raise self.fail.pop(0)

    async def step(self, step: int, groups: Groups) -> StepResult:
        self.may_fail()
        assert step == self.first_step + len(self.steps)
        self.steps.append(step)
        self.trained += [trajectory.uid for group in groups for trajectory in group]
        return StepResult(self.manifest(step), {}, 1)

    async def publish_initial(self) -> Manifest:
        self.may_fail()
        return self.manifest(self.first_step - 1)

    async def set_incarnation(self, incarnation: str) -> None:
        self.may_fail()
        self.incarnation = incarnation

    async def save_checkpoint(self, path: Path, *, extra: Any = None) -> None:
        self.may_fail()
        path.mkdir(parents=True)
        (path / "trained").write_text(" ".join(self.trained))

    async def shutdown(self) -> None:
        self.is_shut_down = True


class Restarts:
    """Restarting learners of a run directory; `groups` are the started ones, `published` the published manifests."""

    def __init__(self, path: Path, *, start: Callable[..., Awaitable[Any]] | None = None, **changes: Any) -> None:
        path.mkdir(exist_ok=True)
        self.run = RunDirectory(path)
        self.config = CONFIG.model_copy(update=changes)
        self.groups: list[Any] = []
        self.next: list[FakeGroup] = []
        self.published: list[Manifest] = []
        self.notes: list[str] = []
        self._start_group = start or self._fake

    async def open(self) -> RestartingLearners:
        group = await self._start(None, 1)
        self.learners = RestartingLearners(
            group,
            self._start,
            config=self.config,
            run=self.run,
            version=0,
            publish=self.publish,
            note=self.notes.append,
        )
        await self.publish(await self.learners.publish_initial())
        return self.learners

    async def _start(self, checkpoint: Path | None, first_step: int) -> Any:
        self.groups.append(await self._start_group(checkpoint, first_step))
        return self.groups[-1]

    async def _fake(self, checkpoint: Path | None, first_step: int) -> FakeGroup:
        group = self.next.pop(0) if self.next else FakeGroup(incarnation=f"number {len(self.groups)}")
        group.checkpoint, group.first_step = checkpoint, first_step
        group.trained = (checkpoint / "trained").read_text().split(" ") if checkpoint else []
        return group

    async def publish(self, manifest: Manifest) -> None:
        self.published.append(manifest)

    async def step(self, step: int) -> StepResult:
        """Train, record and publish one step."""
        result = await self.learners.step(step, groups_of(step))
        record_step(self.run.path, step, groups_of(step))
        await self.publish(result.manifest)
        return result

    async def checkpoint(self, step: int) -> None:
        await self.learners.save_checkpoint(self.run.path / "checkpoints" / "ppo" / f"step-{step:06d}")


async def rig_at(path: Path, step: int, *, checkpoint: int | None = None, **changes: Any) -> Restarts:
    rig = Restarts(path, **changes)
    await rig.open()
    for number in range(1, step + 1):
        await rig.step(number)
        if number == checkpoint:
            await rig.checkpoint(number)
    return rig


def checksums(manifest: Manifest) -> list[str]:
    return [entry.checksum for entry in manifest.tensors]


@pytest.mark.parametrize("error", [DIED, HUNG])
async def test_a_group_that_dies_or_hangs_is_restarted_and_trains_the_step(tmp_path: Path, error: Exception) -> None:
    rig = await rig_at(tmp_path, 4, checkpoint=2)
    rig.groups[0].fail = [error]
    result = await rig.step(5)
    undisturbed = await rig_at(tmp_path / "other", 5)
    assert checksums(result.manifest) == checksums(undisturbed.published[-1])
    assert rig.groups[0].is_shut_down
    assert (rig.groups[1].checkpoint, rig.groups[1].steps) == (tmp_path / "checkpoints/ppo/step-000002", [3, 4, 5])
    assert rig.notes == [f"{error}; rebuilt from checkpoint step 2, 2 steps trained again in 0 s"]
    assert rig.run.summary()["num_learner_restarts"] == rig.learners.num_restarts == 1


async def test_every_step_is_trained_again_without_a_checkpoint(tmp_path: Path) -> None:
    rig = await rig_at(tmp_path, 1)
    rig.groups[0].fail = [DIED]
    await rig.step(2)
    assert rig.groups[1].steps == [1, 2]
    assert rig.notes == ["learner-1: its process died; rebuilt from the start, 1 step trained again in 0 s"]


async def test_the_same_bits_are_published_again_as_the_same_version(tmp_path: Path) -> None:
    """Actors do not reload the version; a new actor does not fetch it from a dead process."""
    rig = await rig_at(tmp_path, 2)
    rig.groups[0].fail = [DIED]
    await rig.step(3)
    before, again, after = rig.published[-3:]
    assert [(m.incarnation, m.version) for m in (before, again, after)] == [("number 0", v) for v in (2, 2, 3)]
    assert checksums(before) == checksums(again)
    assert (before.tensors[0].reference, again.tensors[0].reference) == (rig.groups[0], rig.groups[1])


async def test_other_bits_are_published_as_another_incarnation_with_a_note(tmp_path: Path) -> None:
    rig = await rig_at(tmp_path, 2)
    rig.next = [FakeGroup(salt="other", incarnation="second")]
    rig.groups[0].fail = [DIED]
    await rig.step(3)
    before, again, after = rig.published[-3:]
    assert [(m.incarnation, m.version) for m in (before, again, after)] == [
        ("number 0", 2),
        ("second", 2),
        ("second", 3),
    ]
    assert rig.notes[1] == (
        "learner group: version 2 trained again differs in 1 of 1 tensors; it is published again and the actors reload"
    )


async def test_a_group_that_dies_while_writing_a_checkpoint_is_restarted(tmp_path: Path) -> None:
    rig = await rig_at(tmp_path, 3, checkpoint=2)
    rig.groups[0].fail = [DIED]
    await rig.checkpoint(3)
    assert rig.groups[1].steps == [3]
    assert (tmp_path / "checkpoints" / "ppo" / "step-000003").is_dir()


async def test_a_failure_beyond_the_budget_ends_the_run_with_its_own_error(tmp_path: Path) -> None:
    rig = await rig_at(tmp_path, 2, max_restarts=2)
    rig.next = [FakeGroup(fail=[HUNG]), FakeGroup(fail=[DIED])]
    rig.groups[0].fail = [DIED]
    with pytest.raises(LearnerDied, match="learner-1: its process died"):
        await rig.step(3)
    assert len(rig.groups) == 3
    assert rig.run.summary()["num_learner_restarts"] == 2


@pytest.mark.parametrize("change", [{"max_restarts": 0}, {"num_learners": 0}])
async def test_a_group_is_not_restarted_without_budget_or_learner_processes(tmp_path: Path, change: Any) -> None:
    rig = await rig_at(tmp_path, 1, **change)
    rig.groups[0].fail = [HUNG]
    with pytest.raises(DeadlineExceeded):
        await rig.step(2)
    assert len(rig.groups) == 1


async def test_an_error_that_a_learner_reports_is_raised_with_its_batch_kept(tmp_path: Path) -> None:
    rig = await rig_at(tmp_path, 1)
    uid = groups_of(2)[1][0].uid
    rig.groups[0].fail = [LearnerError(f"trajectory {uid}", "its reward is nan", uids=[uid])]
    path = tmp_path / "failed" / "step-000002.arrow"
    with pytest.raises(LearnerError) as failure:
        await rig.step(2)
    assert str(failure.value) == f"trajectory {uid}: its reward is nan (antiphon inspect {path})"
    assert [t.uid for t in read_trajectories(path)][:2] == [uid, groups_of(2)[0][0].uid]
    assert len(rig.groups) == 1
    assert rig.notes == []


def test_a_batch_read_from_the_journal_is_the_same_bit_for_bit(tmp_path: Path) -> None:
    groups = groups_of(3)
    groups[1][0] = replace(groups[1][0], reward=1 / 3, reward_parts={"oracle": math.pi})
    rows = [trajectory for group in groups for trajectory in group]
    record_step(tmp_path, 3, groups)
    read = History(tmp_path / RECORDS).groups(3)
    assert [[t.uid for t in group] for group in read] == [[t.uid for t in group] for group in groups]
    before, after = make_batch(rows), make_batch([trajectory for group in read for trajectory in group])
    for name in ("token_ids", "mask", "behavior_logprobs", "versions", "scores", "groups", "turn_rewards"):
        assert torch.equal(getattr(before, name), getattr(after, name)), name
    assert (before.uids, before.lengths) == (after.uids, after.lengths)


async def test_a_step_that_is_missing_from_the_journal_is_named(tmp_path: Path) -> None:
    rig = await rig_at(tmp_path, 2)
    rig.groups[0].fail = [DIED]
    sorted((tmp_path / RECORDS).iterdir())[-1].unlink()
    with pytest.raises(RecorderError, match="step 2 is not in the log"):
        await rig.step(3)


# On a real Ray.


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_policy(tmp_path_factory.mktemp("policy") / "tied")


def real_rig(path: Path, policy: Path, **changes: Any) -> Restarts:
    from learner.ppo.group import PPOLearnerGroup
    from learner.ppo.rank import LearnerSettings

    config = CONFIG.model_copy(update=changes)

    async def start(checkpoint: Path | None, first_step: int) -> Any:
        place = Place(policy, checkpoint_path=checkpoint)
        return await PPOLearnerGroup.start(LearnerSettings(config, place, 0.7, version=first_step - 1))

    return Restarts(path, start=start, **changes)


@pytest.fixture(scope="module")
def undisturbed(ray_session: None, policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Sequence[Any]:
    """Return the checksums of versions 0 to 5 of a run without failures."""

    async def train() -> Sequence[Any]:
        rig = real_rig(tmp_path_factory.mktemp("undisturbed"), policy)
        learners = await rig.open()
        for step in range(1, 6):
            await rig.step(step)
        await learners.shutdown()
        return [checksums(manifest) for manifest in rig.published]

    return asyncio.run(train())


async def second_rank(group: Any) -> psutil.Process:
    return psutil.Process((await rank_process_ids(group))[1])


async def in_the_middle_of(step: asyncio.Task[Any], group: Any) -> None:
    """Wait until both ranks have received the step; the first waits for the second, which is stopped."""
    while group._group._group._worker_manager.num_outstanding_async_reqs() < 2:
        assert not step.done()
        await asyncio.sleep(0.01)


@pytest.mark.slow
@pytest.mark.ray
async def test_a_rank_killed_during_a_step_changes_no_bit(
    undisturbed: Sequence[Any], policy: Path, tmp_path: Path
) -> None:
    rig = real_rig(tmp_path, policy)
    learners = await rig.open()
    for step in range(1, 4):
        await rig.step(step)
        if step == 2:
            await rig.checkpoint(2)
    rank = await second_rank(rig.groups[0])
    rank.send_signal(signal.SIGSTOP)
    stepping = asyncio.create_task(rig.step(4))
    await in_the_middle_of(stepping, rig.groups[0])
    rank.kill()
    await stepping
    await rig.step(5)
    await learners.shutdown()
    assert [checksums(manifest) for manifest in rig.published] == [*undisturbed[:4], *undisturbed[3:]]
    assert {manifest.incarnation for manifest in rig.published} == {rig.published[0].incarnation}
    (note,) = rig.notes
    assert note.startswith("learner-1: its process died; rebuilt from checkpoint step 2, 1 step trained again in ")


@pytest.mark.chaos
@pytest.mark.ray
async def test_a_rank_that_hangs_is_killed_and_changes_no_bit(
    undisturbed: Sequence[Any], policy: Path, tmp_path: Path
) -> None:
    rig = real_rig(tmp_path, policy)
    learners = await rig.open()
    await rig.step(1)
    rank = await second_rank(rig.groups[0])
    rig.groups[0]._config = CONFIG.model_copy(update={"step_timeout_s": 5.0})
    rank.send_signal(signal.SIGSTOP)
    await rig.step(2)
    await rig.step(3)
    await learners.shutdown()
    assert [checksums(manifest) for manifest in rig.published] == [*undisturbed[:2], *undisturbed[1:4]]
    waited = "learner group: waited 5 s for 2 learners to finish step 2; rebuilt from the start, 1 step trained again"
    assert rig.notes[0].startswith(waited)
    assert not is_running(rank)
