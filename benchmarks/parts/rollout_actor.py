"""Compare sampled tokens/s of a whole rollout actor with plain `LLM.generate`.

Prompts and engine settings are the same. The learner is a stand-in that takes batches, sleeps and publishes only
version 0. Both are Ray actors on the same machine, measured alternately (A B A B).
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.results import Row
from benchmarks.tasks.letters import letters_config
from cluster.actors.remote import RemoteActor, kill_actor, start_actor
from cluster.data.prompt_order import TaskPrompts
from cluster.queue.trajectory_queue import TrajectoryQueue
from cluster.weights.manifest import Manifest
from cluster.weights.store import WeightStore
from deploy.config.schema import RunConfig
from learner.model.actor_critic import ActorCritic, ModelSettings
from learner.ppo.weights import WeightPublisher, default_probe
from reward_service.client.handle import HandleRewardClient
from reward_service.serving.application import start_reward_service, stop_reward_service
from rollout_actors.actor import RolloutActor
from rollout_actors.engine.loading import MIN_MODEL_LEN
from rollout_actors.engine.vllm_engine import engine_settings

NUM_STEPS, REPEATS, STAND_IN_S = 60, 5, 0.05


class PlainEngine:
    """`LLM.generate` with the settings of a rollout actor's engine."""

    async def start(self, model_path: str, max_num_seqs: int) -> None:
        """Build the engine in this process."""
        import os

        os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        from vllm import LLM

        self._llm = LLM(
            **engine_settings(
                model_path,
                engine_args={"max_num_seqs": max_num_seqs},
                max_model_len=MIN_MODEL_LEN,
                seed=0,
                dtype="float32",
                on_cpu=True,
            )
        )

    async def tokens_per_s(self, prompts: list[str], max_tokens: int) -> float:
        """Generate for all prompts in one call and return sampled tokens per second."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        started = time.monotonic()
        params = [
            SamplingParams(
                max_tokens=max_tokens,
                temperature=1.0,
                seed=seed,
                logprobs=0,
                flat_logprobs=True,
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            for seed in range(len(prompts))
        ]
        outputs = self._llm.generate(prompts, params, use_tqdm=False)
        num_tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
        return num_tokens / (time.monotonic() - started)


async def measure(model: Path, rows: list[dict[str, Any]]) -> list[Row]:
    """Measure ratios and both rates `REPEATS` times each, after a warm-up of each."""
    config = letters_config(num_steps=NUM_STEPS, max_policy_lag=NUM_STEPS)
    await asyncio.to_thread(
        start_reward_service, config.reward_service, name="bench", reward_model_path=None, token=None
    )
    settings = config.rollout_actors
    actor = start_actor(RolloutActor, "rollout-0", settings, model_path=str(model), dtype="float32", seed=0, name="a")
    plain = start_actor(PlainEngine, name="plain")
    ours, theirs = [], []
    try:
        await actor.start()
        await plain.start(str(model), settings.num_concurrent_groups)
        prompts = [row["prompt"] for row in rows][: NUM_STEPS * config.trajectory_queue.groups_per_step]
        for repeat in range(REPEATS + 1):
            ours.append(await _actor_tokens_per_s(actor, config, rows, version_zero(model, f"bench-{repeat}")))
            theirs.append(await plain.tokens_per_s(prompts, settings.max_response_tokens))
    finally:
        kill_actor(actor)
        kill_actor(plain)
        await asyncio.to_thread(stop_reward_service, "bench")
    ratios = tuple(a / b for a, b in zip(ours[1:], theirs[1:], strict=True))
    return [
        Row("rollout actor over plain LLM.generate, sampled tokens/s", ratios, "", ">= 0.9"),
        Row("rollout actor", tuple(ours[1:]), "tokens/s"),
        Row("plain LLM.generate", tuple(theirs[1:]), "tokens/s"),
    ]


def version_zero(model: Path, incarnation: str) -> Manifest:
    """Return a manifest that publishes the model's own weights."""
    policy = ActorCritic(ModelSettings(model, "float32", "none", 1.0))
    publisher = WeightPublisher(
        policy, default_probe(policy.policy.config, 0), torch.device("cpu"), "float32", incarnation
    )
    return publisher.publish(0, with_tensors=True)


async def _actor_tokens_per_s(
    actor: RemoteActor, config: RunConfig, rows: list[dict[str, Any]], published: Manifest
) -> float:
    prompts = [TaskPrompts("letters", rows)]
    queue = start_actor(
        TrajectoryQueue, config.trajectory_queue, prompts, run_seed=0, num_steps=NUM_STEPS, name="trajectory_queue"
    )
    store = start_actor(WeightStore, name="weight_store")
    await store.publish(published)
    await queue.published(0)
    running = asyncio.ensure_future(actor.run(queue, store, HandleRewardClient("bench", timeout_s=60)))
    await queue.take(1)
    before, started = (await actor.metrics())["num_sampled_tokens"], time.monotonic()
    for step in range(2, NUM_STEPS + 1):
        await queue.take(step)
        await asyncio.sleep(STAND_IN_S)
    ended = time.monotonic()
    tokens = (await actor.metrics())["num_sampled_tokens"] - before
    await actor.stop()
    await running
    kill_actor(queue)
    kill_actor(store)
    return float(tokens / (ended - started))
