"""What the log says of a learner's steps and of publications, and when."""

from __future__ import annotations

from collections.abc import Sequence

from cluster.journal.events import Record
from cluster.weights.manifest import Manifest
from deploy.ring.calls import RecordedLearners, RecordedWeights
from learner.training_loop import Groups, StepResult, train
from tests.learner.conftest import make_trajectory
from tests.support.fakes import fake_manifest


class Ring:
    """Queue, learners, weights and recorder in one, with the order in which they were called."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.records: list[Record] = []

    async def take(self, step: int) -> list[list[object]]:
        return [[make_trajectory(0, seed=step), make_trajectory(1, seed=step)], [make_trajectory(2, seed=step)]]

    async def step(self, step: int, groups: Groups) -> StepResult:
        self.events.append(f"step {step}")
        return StepResult(fake_manifest(step), {}, 1)

    async def publish(self, manifest: Manifest) -> None:
        self.events.append(f"publish {manifest.version}")

    async def record(self, records: Sequence[Record]) -> None:
        self.events.append(records[0]["kind"])
        self.records += records

    async def report(self, step: int, groups: Groups, result: StepResult) -> None:
        return None


async def test_a_step_is_recorded_as_trained_before_its_version_is_published_and_as_published_after() -> None:
    ring = Ring()
    await train(
        first_step=1,
        num_steps=2,
        learners=RecordedLearners(ring, ring),
        queue=ring,
        weights=RecordedWeights(ring, ring),
        report=ring.report,
    )
    assert ring.events == [f for s in (1, 2) for f in (f"step {s}", "TRAIN", f"publish {s}", "PUBLISH")]
    assert [(r["uid"], r["position"]) for r in ring.records if r.get("step") == 2] == [
        ("2-0-0", 0),
        ("2-1-0", 1),
        ("2-2-0", 2),
    ]
