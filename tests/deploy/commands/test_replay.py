"""Replay of an asynchronous run with fakes: weights are a hash of the training data, tokens follow from the seed."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from cluster.errors import AntiphonError, InputError, RecorderError
from cluster.journal import events
from cluster.journal.files import LogFile
from cluster.journal.history import History
from cluster.trajectory import Segment, Ticket, Trajectory, Turn, segment_seed
from cluster.weights.manifest import Manifest, TensorEntry
from deploy.commands.history.explanation import explain_conversation
from deploy.commands.history.resampling import TokenReplay
from deploy.commands.history.retraining import Replay, changed_config, make_plan
from deploy.config.load import load_run_config
from deploy.config.toml import to_toml
from deploy.run.directory import RunDirectory
from deploy.run.layout import CONFIG
from learner.training_loop import Groups, StepResult
from rollout_actors.actor import RolloutActor
from rollout_actors.config import RolloutActorsConfig
from tests.support.fakes import FIRST_TOKEN, FakeEngine, fake_manifest
from tests.support.tiny import build_folder

NUM_STEPS, LAG = 6, 2
VOCABULARY = 48


class FakeLearners:
    """Learners whose weights are a hash of all training data and, after step `salt_from`, of `salt`."""

    def __init__(self, trained: str = "", *, first_step: int = 1) -> None:
        self.trained = trained
        self.first_step = self.next_step = first_step
        self.salt = ""
        self.salt_from = NUM_STEPS + 1
        self.is_shut_down = False

    def manifest(self) -> Manifest:
        text = self.trained + (self.salt if self.next_step > self.salt_from else "")
        checksum = hashlib.sha256(text.encode()).hexdigest()
        entries = (
            TensorEntry("still", (1,), "float32", "same", None),
            TensorEntry("w", (1,), "float32", checksum, None),
        )
        return replace(fake_manifest(self.next_step - 1), tensors=entries)

    async def publish_initial(self) -> Manifest:
        return self.manifest()

    async def step(self, step: int, groups: Groups) -> StepResult:
        assert step == self.next_step
        trained = [replace(trajectory, step=step) for group in groups for trajectory in group]
        self.trained = hashlib.sha256((self.trained + repr(trained)).encode()).hexdigest()
        self.next_step += 1
        return StepResult(self.manifest(), {"learner/kl_nats": step / 8}, 1)

    async def shutdown(self) -> None:
        self.is_shut_down = True


def sampled(seed: int, num: int) -> list[int]:
    """Return the tokens that a FakeEngine samples from a seed."""
    return [FIRST_TOKEN + (seed + i) % (VOCABULARY - FIRST_TOKEN) for i in range(num)]


def trajectory(step: int, group: int, index: int) -> Trajectory:
    """A response begun `LAG` versions before its step's and split into segments by every swap since."""
    uid, prompt = f"3-{group}-{index}", [4, 5, 6 + group]
    versions = range(max(0, step - 1 - LAG), step)
    seeds = [segment_seed(uid, number) for number in range(len(versions))]
    lengths = [2 + (group + number) % 3 for number in range(len(versions))]
    tokens = [sampled(seed, length) for seed, length in zip(seeds, lengths, strict=True)]
    starts = [len(prompt) + sum(lengths[:number]) for number in range(len(versions))]
    num = sum(lengths)
    return Trajectory(
        uid=uid,
        group=group,
        task="test",
        token_ids=prompt + [token for part in tokens for token in part],
        mask=[False] * len(prompt) + [True] * num,
        behavior_logprobs=[0.0] * len(prompt) + [-0.5] * num,
        segments=[
            Segment(version, start, length, seed, "rollout-0")
            for version, start, length, seed in zip(versions, starts, lengths, seeds, strict=True)
        ],
        turns=[Turn(len(prompt), num)],
        admission_index=group,
        finish_reason="length",
        reward=group / 7,
    )


def groups_of(step: int) -> list[list[Trajectory]]:
    return [[trajectory(step, group, index) for index in range(2)] for group in (2 * step - 2, 2 * step - 1)]


@pytest.fixture
async def run(tmp_path: Path) -> RunDirectory:
    """A run of NUM_STEPS steps with its journal and a checkpoint of step 3."""
    learners = FakeLearners()
    recorded = [events.start("command", version=0, group=0, num_steps=6), events.publish(learners.manifest())]
    checkpoint = tmp_path / "checkpoints" / "ppo" / "step-000003"
    checkpoint.mkdir(parents=True)
    for step in range(1, NUM_STEPS + 1):
        groups = groups_of(step)
        for group in groups:
            number = group[0].group
            recorded.append(
                events.admit(Ticket(number, number, max(0, step - 1 - LAG), 3, {"prompt": "p"}, "rollout-0"))
            )
            recorded += [record for member in group for record in events.finished(member)]
        result = await learners.step(step, groups)
        recorded += [*events.train(step, groups), events.publish(result.manifest)]
        if step == 3:
            (checkpoint / "trained").write_text(learners.trained)
    (tmp_path / "records").mkdir()
    log = LogFile(tmp_path / "records" / "records-000000.arrows")
    log.append([{"number": number, "time_s": 0.0, **record} for number, record in enumerate(recorded)])
    log.close()
    return RunDirectory(tmp_path)


class FakeReplay:
    """A replay of a run with fakes; `learners` are those it started."""

    def __init__(self, run: RunDirectory, steps: str | None = None, *, older: int = 0, salt_from: int | None = None):
        self.history = History(run.path / "records")
        self.plan = make_plan(run, self.history, steps, older=older)
        self.salt_from = salt_from
        self.learners = FakeLearners()
        self.metrics: list[Mapping[str, float]] = []
        self.replay = Replay(self._start, self.history, self.plan, self.metrics.append)  # type: ignore[arg-type]

    async def _start(self, checkpoint: Path | None, first_step: int) -> FakeLearners:
        trained = (checkpoint / "trained").read_text() if checkpoint else ""
        self.learners = FakeLearners(trained, first_step=first_step)
        if self.salt_from is not None:
            self.learners.salt, self.learners.salt_from = "another bit", self.salt_from
        return self.learners


async def test_replay_reproduces_the_checksum_of_every_version(run: RunDirectory) -> None:
    again = FakeReplay(run)
    assert await again.replay.compare() == "versions 0 to 6: 7 of 7 have the recorded checksums"
    assert again.learners.is_shut_down
    assert [metrics["step"] for metrics in again.metrics] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("step", [1, 4])
async def test_replay_names_the_first_step_that_differs_and_stops(run: RunDirectory, step: int) -> None:
    again = FakeReplay(run, salt_from=step)
    with pytest.raises(AntiphonError, match=rf"step {step}: version {step} differs in 1 of 2 tensors \(w\)") as failure:
        await again.replay.compare()
    assert failure.value.exit_code == 1
    assert again.learners.is_shut_down


@pytest.mark.parametrize(
    ("steps", "older", "start"),
    [("4:5", 0, 3), ("5:", 0, 3), ("3:6", 0, 0), (":", 0, 0), ("5:6", LAG, 0), ("6:6", LAG, 3)],
)
async def test_replay_starts_from_the_newest_checkpoint_old_enough(
    run: RunDirectory, steps: str, older: int, start: int
) -> None:
    again = FakeReplay(run, steps, older=older)
    last = int(steps.split(":")[1] or NUM_STEPS)
    num = last - start + 1
    assert await again.replay.compare() == f"versions {start} to {last}: {num} of {num} have the recorded checksums"
    assert again.learners.first_step == start + 1


@pytest.mark.parametrize(
    ("steps", "what"),
    [("3", "'3' is not A:B"), ("5:4", "5:4 is not within"), ("1:7", "1:7 is not within the recorded steps, 1:6")],
)
async def test_replay_fails_if_the_steps_are_invalid(run: RunDirectory, steps: str, what: str) -> None:
    with pytest.raises(InputError, match=f"--steps: {what}"):
        FakeReplay(run, steps)


def test_replay_fails_if_the_run_has_no_journal(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has recorded no step"):
        FakeReplay(RunDirectory(tmp_path))


async def test_what_if_prints_new_curves_beside_the_recorded_ones(run: RunDirectory) -> None:
    metrics: list[dict[str, Any]] = [
        {"stage": "sft", "step": 1},
        *({"stage": "ppo", "step": s, "learner/kl_nats": s / 4} for s in (1, 2, 3)),
    ]
    console = Console(width=120)
    with console.capture() as capture:
        console.print(await FakeReplay(run, ":2").replay.curves(metrics))
    lines = [line.split() for line in capture.get().splitlines()]
    assert ["1", "?", "->", "?", "0.2500", "->", "0.1250", "?", "->", "?", "?", "->", "?"] in lines
    assert ["2", "?", "->", "?", "0.5000", "->", "0.2500", "?", "->", "?", "?", "->", "?"] in lines


async def test_what_if_accepts_only_learner_settings(run: RunDirectory) -> None:
    config = load_run_config(Path("examples/letters/fast.toml"))
    (run.path / CONFIG).write_text(to_toml(config))
    assert changed_config(run, config, ["learner.clip = 0.1"]).learner.clip == 0.1
    assert changed_config(run, config, ['learner.constraint.cost = "a"']).learner.constraint.cost == "a"
    with pytest.raises(InputError, match=r"--what-if: rollout_actors\.temperature is not a learner setting"):
        changed_config(run, config, ["learner.clip = 0.1", "rollout_actors.temperature = 0.5"])
    with pytest.raises(InputError, match="--what-if: 'clip' is not a line of TOML"):
        changed_config(run, config, ["clip"])


@pytest.fixture
async def actors(tmp_path: Path) -> AsyncIterator[Callable[..., Awaitable[Sequence[RolloutActor]]]]:
    """`actors(n, **engine)` returns rollout actors with fake engines."""
    folder = build_folder(tmp_path / "model", tied=True)
    started: list[RolloutActor] = []

    async def start(num: int, **engine: Any) -> Sequence[RolloutActor]:
        for number in range(num):
            started.append(
                RolloutActor(
                    f"replay-{number}",
                    RolloutActorsConfig(max_prompt_tokens=4, max_response_tokens=16),
                    model_path=str(folder),
                    dtype="float32",
                    seed=0,
                    build_engine=lambda: FakeEngine(**engine),
                    fetch_tensors=lambda manifest: {},
                )
            )
        await asyncio.gather(*(actor.start() for actor in started))
        return started

    yield start
    await asyncio.gather(*(actor.close() for actor in started))


def token_replay(again: FakeReplay, actors: Sequence[Any]) -> TokenReplay:
    steps = range(again.plan.first, again.plan.last + 1)
    return TokenReplay(actors, again.history, steps=steps, max_policy_lag=LAG, temperature=1.0)


@pytest.mark.parametrize(("steps", "num_segments"), [(None, 4 * (1 + 2 + 3 + 3 + 3 + 3)), ("5:6", 4 * 6)])
async def test_every_segment_is_sampled_again_with_its_version(
    run: RunDirectory, actors: Any, steps: str | None, num_segments: int
) -> None:
    again = FakeReplay(run, steps, older=LAG)
    engines = await actors(2)
    tokens = token_replay(again, engines)
    await again.replay.compare(tokens)
    assert tokens.report().startswith(
        f"sampled again: 100.00% token-identical ({num_segments} of {num_segments} segments"
    )
    tokens.require_identical()
    for actor in engines:
        assert (await actor.metrics())["policy_version"] == NUM_STEPS - 1
        assert (await actor.metrics())["num_responses"] == num_segments / 2


def test_a_segment_is_sampled_again_after_the_tokens_of_its_own_sequence() -> None:
    whole = Trajectory(
        uid="3-0-0",
        group=0,
        task="test",
        token_ids=[4, 5, 9, 4, 5, 6, 9, 9],
        mask=[False, False, True, False, False, False, True, True],
        behavior_logprobs=[0.0] * 8,
        segments=[Segment(0, 2, 1, 7, "a"), Segment(0, 6, 1, 8, "a"), Segment(0, 7, 1, 9, "a")],
        turns=[Turn(2, 1), Turn(6, 2)],
        admission_index=0,
        finish_reason="stop",
        reward=1.0,
        sequence_starts=[3],
    ).check()
    history: Any = SimpleNamespace(groups=lambda step: [[whole]])
    tokens = TokenReplay([], history, steps=range(1, 2), max_policy_lag=0, temperature=1.0)
    assert [list(segment.request.token_ids) for segment in tokens._segments(0)] == [[4, 5], [4, 5, 6], [4, 5, 6, 9]]


async def test_differing_segments_are_counted_and_the_first_is_named(run: RunDirectory, actors: Any) -> None:
    again = FakeReplay(run)
    tokens = token_replay(again, await actors(1, stop_after=3))
    await again.replay.compare(tokens)
    trained = [t for step in range(1, NUM_STEPS + 1) for group in groups_of(step) for t in group]
    lengths = [segment.length for t in trained for segment in t.segments]
    num = sum(length > 2 for length in lengths)
    assert f"({60 - num} of 60 segments; 120 of {sum(lengths)} tokens" in tokens.report()
    with pytest.raises(
        AntiphonError, match=rf"tokens: {num} of 60 segments differ, the first is segment \d of 3-\d+-\d from its"
    ):
        tokens.require_identical()


async def test_replay_names_a_step_missing_from_the_journal(run: RunDirectory) -> None:
    again = FakeReplay(run)
    del again.history._steps[2]
    with pytest.raises(RecorderError, match="step 2 is not in the log"):
        await again.replay.compare()


async def test_explain_fails_if_the_conversation_was_not_trained(run: RunDirectory) -> None:
    history = History(run.path / "records")
    assert [history.step_of(f"3-{group}-1") for group in (0, 1, 4, 99)] == [1, 1, 3, None]
    (run.path / CONFIG).write_text('[model]\nbuilder = "a:b"\n[data]\nbuilder = "a:b"\n')
    with pytest.raises(InputError, match=r"^UID: no recorded step of .* was trained on '3-99-1'$"):
        explain_conversation(run, "3-99-1", html=None)
    with pytest.raises(InputError, match=r"^--html: no such folder: .*nowhere$"):
        explain_conversation(run, "3-4-1", html=run.path / "nowhere" / "why.html")
