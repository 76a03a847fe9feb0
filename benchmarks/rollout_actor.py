"""Sampled tokens/s of a rollout actor, with everything around its engine, over plain `LLM.generate`.

The same prompts and engine settings; the learner is a stand-in that takes batches and publishes nothing. Both are
Ray actors on the same machine and measured in turn, A B A B.
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

from benchmarks.letters import letters_config, make_task
from benchmarks.results import Row
from cluster.remote import RemoteActor, kill_actor, start_actor
from cluster.trajectory_queue import TrajectoryQueue
from cluster.weights import WeightStore
from reward_service.client import HandleRewardClient
from reward_service.service import start_reward_service, stop_reward_service
from rollout_actors.rollout_actor import RolloutActor

NUM_STEPS, REPEATS = 40, 3


class PlainEngine:
    """`LLM.generate` with the settings of a rollout actor's engine."""

    async def start(self, model_path: str, max_model_len: int, max_num_seqs: int) -> None:
        """Build the engine in this process."""
        import os

        os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        from vllm import LLM

        self._llm = LLM(
            model_path,
            dtype="float32",
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            enforce_eager=True,
            enable_chunked_prefill=False,
            max_num_batched_tokens=16384,
            logprobs_mode="processed_logprobs",
            distributed_executor_backend="uni",
            disable_log_stats=True,
        )

    async def tokens_per_s(self, prompts: list[str], max_tokens: int, batch: int) -> float:
        """Generate for all prompts, `batch` at a time as a step would, and return sampled tokens a second."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        started, num_tokens = time.monotonic(), 0
        for first in range(0, len(prompts), batch):
            params = [
                SamplingParams(
                    max_tokens=max_tokens,
                    temperature=1.0,
                    seed=first + i,
                    logprobs=0,
                    flat_logprobs=True,
                    detokenize=False,
                    output_kind=RequestOutputKind.FINAL_ONLY,
                )
                for i in range(batch)
            ]
            outputs = self._llm.generate(prompts[first : first + batch], params, use_tqdm=False)
            num_tokens += sum(len(output.outputs[0].token_ids) for output in outputs)
        return num_tokens / (time.monotonic() - started)


async def measure(folder: Path) -> list[Row]:
    """Ratios and both rates, `REPEATS` times each."""
    config = letters_config(num_steps=NUM_STEPS, max_policy_lag=NUM_STEPS)
    model, rows = make_task(folder)
    await asyncio.to_thread(
        start_reward_service, config.reward_service, name="bench", reward_model_path=None, token=None
    )
    settings = config.rollout_actors
    actor = start_actor(
        RolloutActor, "rollout-0", settings, model_path=str(model), dtype="float32", task="letters", seed=0, name="a"
    )
    plain = start_actor(PlainEngine, name="plain")
    batch = config.trajectory_queue.groups_per_step
    try:
        await actor.start()
        await plain.start(str(model), settings.max_prompt_tokens + settings.max_response_tokens, batch)
        prompts = [row["prompt"] for row in rows][: NUM_STEPS * batch]
        ours, theirs = [], []
        for _ in range(REPEATS):
            ours.append(await _actor_tokens_per_s(actor, config, rows))
            theirs.append(await plain.tokens_per_s(prompts, settings.max_response_tokens, batch))
    finally:
        kill_actor(actor)
        kill_actor(plain)
        await asyncio.to_thread(stop_reward_service, "bench")
    ratios = tuple(a / b for a, b in zip(ours, theirs, strict=True))
    return [
        Row("rollout actor over plain LLM.generate, sampled tokens/s", ratios, "", ">= 0.9"),
        Row("rollout actor, sampled tokens/s", tuple(ours)),
        Row("plain LLM.generate, sampled tokens/s", tuple(theirs)),
    ]


async def _actor_tokens_per_s(actor: RemoteActor, config: Any, rows: list[dict[str, Any]]) -> float:
    queue = start_actor(
        TrajectoryQueue, config.trajectory_queue, rows, run_seed=0, num_steps=NUM_STEPS, name="trajectory_queue"
    )
    store = start_actor(WeightStore, name="weight_store")
    await queue.published(0)
    running = asyncio.ensure_future(_label_version_zero(actor, store, queue))
    await queue.take(1)
    before, started = (await actor.metrics())["num_sampled_tokens"], time.monotonic()
    for step in range(2, NUM_STEPS + 1):
        await queue.take(step)
    tokens = (await actor.metrics())["num_sampled_tokens"] - before
    rate = tokens / (time.monotonic() - started)
    await running
    kill_actor(queue)
    kill_actor(store)
    return rate


async def _label_version_zero(actor: RemoteActor, store: RemoteActor, queue: RemoteActor) -> None:
    """The actor's starting weights are version 0 here; nothing else is ever published."""
    await actor.run(queue, store, HandleRewardClient("bench", timeout_s=60))
