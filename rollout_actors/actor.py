"""A rollout actor: admits prompts, samples their responses, has them scored and puts the groups into the queue.

A plain class with async methods that runs as an async Ray actor. Queue, weight store and reward client are faces
handed to `run`. Knows neither the learner nor other actors: weights are pulled, and who holds a group the queue knows.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol

from cluster.errors import EngineError, WeightsLost
from cluster.trajectory import FinishedGroup, PartialGroup, Ticket
from cluster.weights.manifest import Manifest
from rollout_actors.config import EnvironmentConfig, RolloutActorsConfig, max_sequence_tokens
from rollout_actors.conversations.conversation import Conversation, environment_seed, single_turn
from rollout_actors.conversations.runner import Conversations
from rollout_actors.delivery import Deliveries
from rollout_actors.engine.loading import build_vllm, fetch_from_object_store, read_policy
from rollout_actors.engine.protocol import UNLOADED_VERSION, GenerationEngine, SamplingRequest
from rollout_actors.engine.response import SampledResponse
from rollout_actors.engine.thread import EngineThread
from rollout_actors.groups import FLOOR_TIMEOUT_S, GroupSampling, cancelled
from rollout_actors.partials import Safekeeping
from rollout_actors.prompts import PromptTokenizer
from rollout_actors.reward_client import RewardClient

if TYPE_CHECKING:
    import torch

ADMIT_WAIT_S = 1.0
"""How long one call for a ticket waits at the queue; a leaving actor waits for its last one."""
PULL_WAIT_S = 30.0
LOST_WAIT_S = 1.0


class Queue(Protocol):
    """The face of `cluster.queue.trajectory_queue.TrajectoryQueue` that an actor uses."""

    def admit(self, owner: str, *, max_groups: int, timeout_s: float) -> Awaitable[list[Ticket]]: ...
    def keep(self, owner: str, groups: Sequence[PartialGroup]) -> Awaitable[None]: ...
    def put(self, groups: Sequence[FinishedGroup]) -> Awaitable[None]: ...
    def void(self, ticket: Ticket, reason: str) -> Awaitable[None]: ...
    def hand_over(self, owner: str) -> Awaitable[list[int]]: ...


class Weights(Protocol):
    """The face of `cluster.weights.WeightStore` that an actor uses."""

    def wait_other(self, key: tuple[str, int] | None, *, timeout_s: float) -> Awaitable[Manifest | None]: ...


@dataclass(frozen=True, slots=True)
class Response:
    """A response sampled outside training: N tokens with their log-probabilities, and their text."""

    text: str
    prompt_token_ids: list[int]
    token_ids: list[int]
    logprobs: list[float]


class RolloutActor:
    """Samples for training while `run` runs, and for evaluation, preferences and chat whenever asked.

    `environments` are those of the tasks, by their names; a prompt of another task is answered once.
    `build_engine` and `fetch_tensors` are where a test puts something smaller than vLLM and Ray's object store.
    """

    def __init__(
        self,
        name: str,
        config: RolloutActorsConfig,
        *,
        model_path: str,
        dtype: str,
        seed: int,
        environments: Mapping[str, EnvironmentConfig] = MappingProxyType({}),
        build_engine: Callable[[], GenerationEngine] | None = None,
        fetch_tensors: Callable[[Manifest], Mapping[str, torch.Tensor]] | None = None,
        before_step: Callable[[], None] = lambda: None,
    ) -> None:
        self._name = name
        self._config = config
        self._model_path = model_path
        self._environments = environments
        self._conversations: dict[str, Conversations] = {}
        self._fetch_tensors = fetch_tensors or fetch_from_object_store
        self._engine = EngineThread(
            build_engine
            or partial(
                build_vllm,
                config,
                model_path=model_path,
                dtype=dtype,
                seed=seed,
                max_tokens=max_sequence_tokens(config, environments.values()),
            ),
            name=name,
            dtype=str(config.engine.get("dtype", dtype)),
            before_step=before_step,
        )
        self._leaving = asyncio.Event()
        self._run: asyncio.Future[None] | None = None
        self._rewards: RewardClient | None = None

    async def start(self) -> None:
        """Load the tokenizer and build the engine in its thread; returns when it is warm."""
        self._tokenizer = await asyncio.to_thread(
            PromptTokenizer, self._model_path, max_prompt_tokens=self._config.max_prompt_tokens
        )
        limit = self._config.max_response_tokens
        self._conversations = {
            task: Conversations(environment, self._tokenizer, self._engine, max_response_tokens=limit)
            for task, environment in self._environments.items()
            if environment.path is not None
        }
        await self._engine.start()

    async def ping(self) -> str:
        """The actor's name: it is alive."""
        return self._name

    async def probe(self) -> bool:
        """Whether a version is loaded to sample with; answers once the engine has come round."""
        return await self._engine.turn() > UNLOADED_VERSION

    async def meet(self, rewards: RewardClient) -> None:
        """Nothing: what a reward client needs is imported on the way here, while the engine starts."""

    async def run(self, queue: Queue, weights: Weights, rewards: RewardClient) -> None:
        """Sample for training until `leave` is called.

        Ends with the error of the first part that fails: the engine, the pull of weights, a reward, the queue.
        """
        self._run = asyncio.get_running_loop().create_future()
        self._rewards = rewards
        tasks: set[asyncio.Future[None]] = set()
        try:
            await self._engine.forget_version()
            tasks |= {
                asyncio.ensure_future(self._admit_groups(queue, rewards)),
                asyncio.ensure_future(self._pull_weights(weights)),
                asyncio.ensure_future(self._engine.ended()),
            }
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            await cancelled(tasks)
            self._leaving.clear()
            self._run.set_result(None)

    async def leave(self) -> None:
        """Stop admitting, forget what is under way, hand its groups over to others and end `run`.

        A call that overtakes the one of `run` ends that run as it begins.
        """
        self._leaving.set()
        if self._run is not None and not self._run.done():
            await asyncio.shield(self._run)

    async def _pull_weights(self, weights: Weights) -> None:
        """Fetch every newest version and offer it to the engine thread.

        Waits for the weight store, whose `publish` wakes it; never ends by itself.
        """
        key: tuple[str, int] | None = None
        while True:
            manifest = await weights.wait_other(key, timeout_s=PULL_WAIT_S)
            if manifest is not None:
                manifest, tensors = await self._fetch(weights, manifest)
                self._engine.offer_weights(manifest, tensors)
                key = (manifest.incarnation, manifest.version)

    async def _fetch(self, weights: Weights, manifest: Manifest) -> tuple[Manifest, Mapping[str, torch.Tensor]]:
        """The tensors of the newest version. Those that went with a learner are published again by its successor:
        waits for that up to FLOOR_TIMEOUT_S, then raises WeightsLost."""
        give_up_at = time.monotonic() + FLOOR_TIMEOUT_S
        while True:
            try:
                return manifest, await asyncio.to_thread(self._fetch_tensors, manifest)
            except WeightsLost:
                if time.monotonic() > give_up_at:
                    raise
            await asyncio.sleep(LOST_WAIT_S)
            manifest = await weights.wait_other(None, timeout_s=PULL_WAIT_S) or manifest

    async def _admit_groups(self, queue: Queue, rewards: RewardClient) -> None:
        """Keep `num_concurrent_groups` groups being sampled, and half as many more waiting for a place.

        Consumes tickets from the queue; waits for tickets (the queue grants them when a version is published or a
        group falls free), for a group to be sampled, for a delivery that fails, and for `leave`. Returns after what
        it holds was handed over.
        """
        num_ahead = self._config.num_concurrent_groups // 2
        deliveries = Deliveries(self._tokenizer, queue, rewards)
        safekeeping = Safekeeping(self._name, queue)
        groups = GroupSampling(
            self._name,
            self._config,
            self._engine,
            self._tokenizer,
            self._conversations,
            queue=queue,
            safekeeping=safekeeping,
            deliveries=deliveries,
        )
        under_way: set[asyncio.Future[Any]] = set()
        leaving = asyncio.ensure_future(self._leaving.wait())
        failing = asyncio.ensure_future(deliveries.failed())
        keeping = asyncio.ensure_future(safekeeping.send_now_and_then())
        admission: asyncio.Future[list[Ticket]] | None = None
        try:
            while not self._leaving.is_set():
                max_groups = self._config.num_concurrent_groups + num_ahead - len(under_way)
                if admission is None and max_groups >= max(1, num_ahead):
                    admission = asyncio.ensure_future(
                        queue.admit(self._name, max_groups=max_groups, timeout_s=ADMIT_WAIT_S)
                    )
                if not under_way:
                    deliveries.flush()
                waits = {leaving, failing, keeping, *under_way, *([admission] if admission else [])}
                done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
                for task in done & {failing, keeping, *under_way}:
                    task.result()
                under_way -= done
                if admission is not None and admission.done():
                    tickets, admission = admission.result(), None
                    under_way |= groups.begin(tickets)
        finally:
            await cancelled({leaving, failing, keeping, *under_way})
            await deliveries.cancel()
            if admission is not None:
                await asyncio.gather(admission, return_exceptions=True)
        if admission is not None:
            admission.result()
        await safekeeping.send()
        await queue.hand_over(self._name)

    def _sample(
        self, uid: str, prompt_token_ids: Sequence[int], temperature: float, floor: int
    ) -> Awaitable[SampledResponse]:
        return self._engine.sample(
            uid,
            prompt_token_ids,
            max_tokens=self._config.max_response_tokens,
            temperature=temperature,
            min_policy_version=floor,
        )

    async def sample(
        self,
        prompts: Sequence[str],
        *,
        seed: int | str,
        num: int = 1,
        temperature: float = 1.0,
        min_policy_version: int | None = None,
    ) -> list[list[Response]]:
        """Sample `num` responses to each prompt, outside training; the same seed gives the same responses.

        With `min_policy_version` it waits until weights at least that new are loaded.
        """
        floor = UNLOADED_VERSION if min_policy_version is None else min_policy_version
        encoded = self._tokenizer.encode(prompts)
        sampled = await asyncio.gather(
            *(
                self._sample(f"sample-{seed}-{i}-{j}", token_ids, temperature, floor)
                for i, token_ids in enumerate(encoded)
                for j in range(num)
            )
        )
        texts = self._tokenizer.decode([s.token_ids for s in sampled])
        responses = [
            Response(text, encoded[place // num], s.token_ids, s.logprobs)
            for place, (text, s) in enumerate(zip(texts, sampled, strict=True))
        ]
        return [responses[i * num : (i + 1) * num] for i in range(len(prompts))]

    async def answer(
        self,
        rows: Sequence[Mapping[str, Any]],
        *,
        task: str,
        seed: int | str,
        num: int = 1,
        temperature: float = 1.0,
        min_policy_version: int | None = None,
    ) -> list[list[Conversation]]:
        """Answer each data row's prompt `num` times, as `sample` does, or talk about it with the task's environment.

        Raises EnvironmentFault where the environment breaks its protocol.
        """
        settings: dict[str, Any] = {"temperature": temperature, "min_policy_version": min_policy_version}
        conversations = self._conversations.get(task)
        if conversations is None:
            sampled = await self.sample([row["prompt"] for row in rows], seed=seed, num=num, **settings)
            return [[_answered(row["prompt"], r) for r in group] for row, group in zip(rows, sampled, strict=True)]
        if min_policy_version is None:
            settings["min_policy_version"] = UNLOADED_VERSION
        held = await asyncio.gather(
            *(
                conversations.hold(f"sample-{seed}-{i}-{j}", row, seed=environment_seed(f"{seed}-{i}"), **settings)
                for i, row in enumerate(rows)
                for j in range(num)
            )
        )
        return [held[i * num : (i + 1) * num] for i in range(len(rows))]

    async def go_on(self, requests: Sequence[SamplingRequest]) -> list[list[int]]:
        """The tokens that follow each request's, sampled under the loaded weights from its own seed."""
        sampled = await asyncio.gather(
            *(
                self._engine.sample(
                    request.id,
                    request.token_ids,
                    max_tokens=request.max_tokens,
                    temperature=request.temperature,
                    seed=request.seed,
                )
                for request in requests
            )
        )
        return [response.token_ids for response in sampled]

    async def load_published(self, manifest: Manifest) -> None:
        """Load a version from where it was published, unproved; for use outside `run`."""
        tensors = await asyncio.to_thread(self._fetch_tensors, manifest)
        await self._engine.load(tensors, version=manifest.version)

    async def load_policy(self, path: str, *, version: int = UNLOADED_VERSION) -> None:
        """Load the weights of a Hugging Face folder under the label `version`; for use outside `run`.

        Raises InputError when the folder holds no safetensors.
        """
        if self._run is not None and not self._run.done():
            raise EngineError(self._name, "loads no policy from a folder while it samples for training")
        await self._engine.load(await asyncio.to_thread(read_policy, Path(path)), version=version)

    async def loaded(self, version: int) -> None:
        """Wait until weights of at least `version` are loaded."""
        await self._engine.loaded(version)

    async def logprobs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-probabilities, at temperature 1, of each sequence's tokens given their prefix, the first left out."""
        return await self._engine.logprobs(sequences)

    async def missing_rewards(self) -> str | None:
        """Which rewards this actor waits for beyond their time, and why; None when all is well."""
        return self._rewards.waiting() if self._rewards is not None else None

    async def metrics(self) -> dict[str, Any]:
        """Totals of the engine thread since its start; see `sampling.SamplingMetrics`."""
        return self._engine.metrics()

    async def take_intervals(self) -> list[tuple[int, float, float]]:
        """When tokens were sampled since the last call: (policy version, start, end), monotonic seconds."""
        return self._engine.take_intervals()

    async def close(self) -> None:
        """Leave, then give the engine back."""
        if self._run is not None and not self._run.done():
            await self.leave()
        for conversations in self._conversations.values():
            await conversations.close()
        await self._engine.close()


def _answered(prompt: str, response: Response) -> Conversation:
    sampled = SampledResponse("", response.token_ids, response.logprobs, [], "stop")
    return replace(single_turn(prompt, response.prompt_token_ids, sampled), response=response.text)
