"""The whole ring with its real parts: vLLM in Ray actors, Ray Serve, RLlib's learner group, swaps while sampling."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import torch
from transformers import AutoModelForCausalLM

from cluster.actors.control import RunControl
from cluster.actors.pool import ActorPool
from cluster.actors.remote import RemoteActor, kill_actor, start_actor
from cluster.config import TrajectoryQueueConfig
from cluster.data.prompt_order import PromptOrder, TaskPrompts
from cluster.errors import ActorDied, RewardError
from cluster.journal.events import Record
from cluster.ledger import QueueCounts
from cluster.queue.trajectory_queue import TrajectoryQueue
from cluster.trajectory import Segment, Ticket, Trajectory, Turn, segment_seed
from cluster.weights.manifest import Manifest
from cluster.weights.store import WeightStore
from deploy.ring.calls import RingCalls
from examples.letters.scorers import count_a
from learner.config import LearnerConfig
from learner.place import Place
from learner.ppo.group import PPOLearnerGroup
from learner.ppo.rank import LearnerSettings
from learner.training_loop import Groups, StepResult, train
from reward_service.client.handle import HandleRewardClient
from reward_service.config.service import RewardServiceConfig
from reward_service.serving.application import num_scored, start_reward_service, stop_reward_service
from rollout_actors.actor import RolloutActor
from rollout_actors.config import RolloutActorsConfig
from rollout_actors.prompts import PromptTokenizer, read_rows
from tests.support.letters import build_data, build_model

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240), pytest.mark.asyncio(loop_scope="module")]

B, RESPONSES, RESPONSE_TOKENS = 8, 2, 16
ROLLOUT = RolloutActorsConfig(
    responses_per_prompt=RESPONSES,
    max_prompt_tokens=9,
    max_response_tokens=RESPONSE_TOKENS,
    num_concurrent_groups=B // 2,
    num_cpus=0,
)
APP = "ring"


@dataclass
class Parts:
    """Parts that the tests of this module share, since engines are slow to start."""

    model: Path
    rows: list[dict[str, Any]]
    pool: ActorPool


@dataclass
class Outcome:
    """The results of a run."""

    manifests: list[Manifest] = field(default_factory=list)
    trajectories: list[Trajectory] = field(default_factory=list)
    metrics: list[dict[str, float]] = field(default_factory=list)
    counts: QueueCounts | None = None

    def checksums(self) -> list[dict[str, str]]:
        return [{entry.name: entry.checksum for entry in manifest.tensors} for manifest in self.manifests]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def parts(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Parts]:
    folder = tmp_path_factory.mktemp("ring")
    for name, builder in (("model", build_model), ("data", build_data)):
        (folder / name).mkdir()
        builder(folder / name, seed=0)

    async def start(name: str) -> RemoteActor:
        actor = start_actor(
            RolloutActor, name, ROLLOUT, model_path=str(folder / "model"), dtype="float32", seed=0, name=name
        )
        await asyncio.gather(actor.start(), actor.preload(HandleRewardClient(APP, timeout_s=30)))
        return actor

    async def stop(actor: RemoteActor) -> None:
        kill_actor(actor)

    config = RewardServiceConfig(scorer="examples.letters.scorers:count_a", num_cpus=0)
    await asyncio.to_thread(start_reward_service, config, name=APP, reward_model_path=None, token=None)
    pool = ActorPool(start, stop, name="rollout", max_restarts=1, note=lambda text: None)
    await pool.fill(2)
    yield Parts(folder / "model", read_rows(folder / "data" / "prompts.parquet"), pool)
    await pool.close()
    await asyncio.to_thread(stop_reward_service, APP)


async def start_learners(parts: Parts, num_steps: int, num_learners: int = 0, **changes: Any) -> PPOLearnerGroup:
    settings = {"learning_rate": 1e-3, "kl_coefficient": 0.01, "num_cpus": 0} | changes
    config = LearnerConfig(num_learners=num_learners, num_steps=num_steps, **settings)
    return await PPOLearnerGroup.start(LearnerSettings(config, Place(parts.model)))


Gate = Callable[[int], Awaitable[None]]


class Recording:
    """A learner group that records its inputs and results."""

    def __init__(self, learners: PPOLearnerGroup, outcome: Outcome, gate: Gate | None = None) -> None:
        self._learners = learners
        self._outcome = outcome
        self._gate = gate

    async def step(self, step: int, groups: Groups) -> StepResult:
        if self._gate is not None:
            await self._gate(step)
        result: StepResult = await self._learners.step(step, groups)
        self._outcome.trajectories += [trajectory for group in groups for trajectory in group]
        self._outcome.manifests.append(result.manifest)
        self._outcome.metrics.append(result.metrics)
        return result


class NoJournal:
    """A recorder that drops its records."""

    async def record(self, records: Sequence[Record]) -> None:
        return None


async def run_ring(
    parts: Parts,
    *,
    num_actors: int,
    num_steps: int,
    lag: int,
    control: RunControl | None = None,
    gate: Gate | None = None,
    **learner: Any,
) -> Outcome:
    """Run from version 0 to `num_steps` with the first `num_actors` actors of the pool."""
    outcome = Outcome()
    config = TrajectoryQueueConfig(groups_per_step=B, max_policy_lag=lag, take_timeout_s=120)
    prompts = [TaskPrompts("letters", parts.rows)]
    queue = start_actor(TrajectoryQueue, config, prompts, run_seed=3, num_steps=num_steps, name="queue")
    store = start_actor(WeightStore, name="store")
    learners = await start_learners(parts, num_steps, **learner)
    actors, parts.pool.actors = parts.pool.actors, parts.pool.actors[:num_actors]
    for actor in actors:
        await actor.load_policy(str(parts.model))
    recording = Recording(learners, outcome, gate)
    calls = RingCalls(queue=queue, learners=recording, store=store, recorder=NoJournal())
    await calls.publish(await learners.publish_initial())
    control = control or RunControl(num_actors)

    async def report(step: int, groups: Groups, result: StepResult) -> None:
        return None

    async def work(actor: RemoteActor) -> None:
        await actor.run(queue, store, HandleRewardClient(APP, timeout_s=30))

    try:
        async with asyncio.TaskGroup() as running:
            running.create_task(
                parts.pool.supervise(work, lost=queue.hand_over, wanted=control.wait_num_rollout_actors)
            )
            await train(
                first_step=1,
                num_steps=num_steps,
                learners=calls,
                queue=calls,
                weights=calls,
                report=report,
            )
            await parts.pool.dismiss()
        outcome.counts = await queue.counts()
    finally:
        parts.pool.actors += [actor for actor in actors[num_actors:] if actor not in parts.pool.actors]
        await learners.shutdown()
        kill_actor(queue)
        kill_actor(store)
    return outcome


async def plain_loop(parts: Parts, num_steps: int) -> Outcome:
    """Train on the same prompts in a plain loop: sample, score, step. No queue, no actor, no service."""
    from cluster.weights.object_store import fetch_tensors
    from rollout_actors.engine.vllm_engine import VllmEngine

    outcome = Outcome()
    engine = VllmEngine(
        str(parts.model), engine_args={"max_num_seqs": 64}, max_model_len=9 + RESPONSE_TOKENS, seed=0, dtype="float32"
    )
    tokenizer = PromptTokenizer(str(parts.model), max_prompt_tokens=9)
    learners = Recording(group := await start_learners(parts, num_steps), outcome)
    order = PromptOrder(parts.rows, 3)
    manifest = await group.publish_initial()
    for step in range(1, num_steps + 1):
        engine.load(fetch_tensors(manifest, timeout_s=30), version=step - 1)
        numbers = range((step - 1) * B, step * B)
        tickets = [Ticket(i, i, step - 1, 3, order.row(i), "plain") for i in numbers]
        groups = _sampled_and_scored(engine, tokenizer, tickets)
        manifest = (await learners.step(step, groups)).manifest
    engine.close()
    await group.shutdown()
    return outcome


def _sampled(engine: Any, requests: list[Any]) -> dict[str, tuple[list[int], list[float]]]:
    """Return the whole responses to these requests."""
    tokens: dict[str, tuple[list[int], list[float]]] = {request.id: ([], []) for request in requests}
    for request in requests:
        engine.add(request)
    while engine.has_work():
        for sampled in engine.step():
            tokens[sampled.id][0].extend(sampled.token_ids)
            tokens[sampled.id][1].extend(sampled.logprobs)
    return tokens


def _sampled_and_scored(engine: Any, tokenizer: PromptTokenizer, tickets: list[Ticket]) -> list[list[Trajectory]]:
    from rollout_actors.engine.protocol import SamplingRequest

    prompts = {t.uid(i): (t, tokenizer.encode([t.row["prompt"]])[0]) for t in tickets for i in range(RESPONSES)}
    requests = [
        SamplingRequest(uid, prompt, RESPONSE_TOKENS, segment_seed(uid, 0), 1.0) for uid, (_, prompt) in prompts.items()
    ]
    trajectories = []
    for uid, (tokens, logprobs) in _sampled(engine, requests).items():
        ticket, prompt = prompts[uid]
        (reward,) = count_a([ticket.row["prompt"]], tokenizer.decode([tokens]))
        trajectories.append(
            Trajectory(
                uid=uid,
                group=ticket.group,
                task="t",
                token_ids=prompt + tokens,
                mask=[False] * len(prompt) + [True] * len(tokens),
                behavior_logprobs=[0.0] * len(prompt) + logprobs,
                segments=[Segment(ticket.min_policy_version, len(prompt), len(tokens), segment_seed(uid, 0), "plain")],
                turns=[Turn(len(prompt), len(tokens))],
                admission_index=ticket.admission_index,
                finish_reason="length",
                reward=reward,
            )
        )
    return [trajectories[i : i + RESPONSES] for i in range(0, len(trajectories), RESPONSES)]


def versions(trajectory: Trajectory) -> list[int]:
    return [segment.policy_version for segment in trajectory.segments]


def largest_lag(trajectories: Sequence[Trajectory]) -> int:
    return max((t.step or 0) - 1 - version for t in trajectories for version in versions(t))


async def test_the_weights_are_those_of_a_plain_loop_at_lag_0(parts: Parts) -> None:
    plain = await plain_loop(parts, 10)
    one = await run_ring(parts, num_actors=1, num_steps=10, lag=0)
    two = await run_ring(parts, num_actors=2, num_steps=10, lag=0)
    assert [t.token_ids for t in one.trajectories] == [t.token_ids for t in plain.trajectories]
    assert plain.checksums() == one.checksums() == two.checksums()
    assert {actor for t in two.trajectories for s in t.segments for actor in [s.actor]} == {"rollout-0", "rollout-1"}
    assert largest_lag(two.trajectories) == 0


@pytest.mark.parametrize("lag", [1, 3])
async def test_no_token_is_older_than_the_bound_with_several_actors(parts: Parts, lag: int) -> None:
    outcome = await run_ring(parts, num_actors=2, num_steps=12, lag=lag)
    assert 0 < largest_lag(outcome.trajectories) <= lag
    assert max(m["cluster/policy_lag_max"] for m in outcome.metrics) == largest_lag(outcome.trajectories)
    assert [t.admission_index for t in outcome.trajectories] == [i // RESPONSES for i in range(12 * B * RESPONSES)]
    assert len({t.uid for t in outcome.trajectories}) == len(outcome.trajectories)


@pytest.mark.slow
async def test_two_remote_learners_train_a_run(parts: Parts) -> None:
    outcome = await run_ring(parts, num_actors=1, num_steps=3, lag=1, num_learners=2)
    assert len(outcome.manifests) == 3
    assert all(metrics["learner/grad_norm"] > 0 for metrics in outcome.metrics)


@pytest.mark.slow
async def test_scaling_one_to_three_to_one_loses_nothing(parts: Parts) -> None:
    control = RunControl(1)

    async def scale(step: int) -> None:
        """Before step 3 wait until two actors have joined, before step 30 until they have left."""
        if step in (3, 30):
            num = 3 if step == 3 else 1
            await control.set_num_rollout_actors(num)
            while len(parts.pool.actors) != num:
                await asyncio.sleep(0.05)

    outcome = await run_ring(parts, num_actors=1, num_steps=40, lag=2, control=control, gate=scale)
    counts = outcome.counts
    assert counts is not None
    assert counts.num_admitted == counts.num_trained + counts.num_void + counts.num_open == 40 * B
    assert (counts.num_void, counts.num_open) == (0, 0)
    assert {s.actor for t in outcome.trajectories for s in t.segments} == {"rollout-0", "rollout-2", "rollout-3"}
    assert {s.actor for t in outcome.trajectories if (t.step or 0) > 33 for s in t.segments} == {"rollout-0"}
    assert largest_lag(outcome.trajectories) <= 2


async def test_the_service_scores_exactly_the_trained_responses(parts: Parts) -> None:
    before = await asyncio.to_thread(num_scored, APP)
    outcome = await run_ring(parts, num_actors=1, num_steps=2, lag=0)
    assert await asyncio.to_thread(num_scored, APP) - before == len(outcome.trajectories) == 2 * B * RESPONSES


@pytest.mark.slow
async def test_a_killed_actor_is_replaced_once_without_loss(parts: Parts) -> None:
    async def kill(step: int) -> None:
        if step == 3:
            kill_actor(parts.pool.actors[0])

    outcome = await run_ring(parts, num_actors=1, num_steps=8, lag=1, gate=kill)
    counts = outcome.counts
    assert counts is not None
    assert (counts.num_admitted, counts.num_trained, counts.num_void, counts.num_open) == (8 * B, 8 * B, 0, 0)
    assert {s.actor for t in outcome.trajectories for s in t.segments} == {"rollout-0", "rollout-0+1"}
    with pytest.raises(ExceptionGroup) as failure:
        await run_ring(parts, num_actors=1, num_steps=8, lag=1, gate=kill)
    assert failure.group_contains(ActorDied, match=r"rollout-0\+1")


async def test_transformers_and_vllm_load_the_policy_folder(parts: Parts, tmp_path: Path) -> None:
    from rollout_actors.engine.vllm_engine import VllmEngine

    folder, token_ids = tmp_path / "policy", [3, 1, 4, 1, 5, 9, 2, 6]
    learners = await start_learners(parts, 1)
    await learners.save_policy(folder)
    await learners.shutdown()
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        whole = model(torch.tensor([token_ids])).logits[0].log_softmax(-1)
    expected = [float(whole[place, token]) for place, token in enumerate(token_ids[1:])]
    engine = VllmEngine(str(folder), engine_args={}, max_model_len=32, seed=0, dtype="float32")
    assert engine.logprobs([token_ids])[0] == pytest.approx(expected, abs=1e-5)
    engine.close()


async def test_a_run_names_the_reward_service_if_it_is_stopped(parts: Parts) -> None:
    async def take_away() -> None:
        before = await asyncio.to_thread(num_scored, APP)
        while await asyncio.to_thread(num_scored, APP) == before:
            await asyncio.sleep(0.05)
        await asyncio.to_thread(stop_reward_service, APP)

    taking = asyncio.create_task(take_away())
    with pytest.raises(ExceptionGroup) as failure:
        await run_ring(parts, num_actors=1, num_steps=1000, lag=1)
    await taking
    assert failure.group_contains(RewardError, match="reward_service")
