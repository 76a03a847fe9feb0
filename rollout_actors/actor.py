"""A rollout actor: admits prompts, samples responses and puts the scored groups into the queue.

A plain class with async methods; deployed as an async Ray actor. `run` receives queue, weight store and reward client.
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
from cluster.queue.protocol import ProducerQueue
from cluster.trajectory import Ticket
from cluster.weights.manifest import Manifest
from rollout_actors.config import EnvironmentConfig, RolloutActorsConfig, max_sequence_tokens
from rollout_actors.conversations.conversation import Conversation, environment_seed, single_turn
from rollout_actors.conversations.runner import Conversations
from rollout_actors.delivery import Deliveries
from rollout_actors.engine.loading import build_vllm, fetch_published, read_policy
from rollout_actors.engine.options import sampling_options
from rollout_actors.engine.protocol import UNLOADED_VERSION, GenerationEngine, SamplingRequest
from rollout_actors.engine.response import ResponseRequest, SampledResponse, SamplingOptions
from rollout_actors.engine.thread import EngineThread
from rollout_actors.groups import FLOOR_TIMEOUT_S, GroupSampling, cancelled
from rollout_actors.parser_choice import choose_parsers
from rollout_actors.partials import PartialsSender
from rollout_actors.prompts import PromptTokenizer
from rollout_actors.reward_client import RewardClient

if TYPE_CHECKING:
    import torch

ADMIT_WAIT_S = 1.0
"""How long one call for tickets waits at the queue. An actor that stops waits for its last call."""
PULL_WAIT_S = 30.0
LOST_WAIT_S = 1.0


class Weights(Protocol):
    """The methods of `WeightStore` that an actor uses."""

    def wait_other(self, key: tuple[str, int] | None, *, timeout_s: float) -> Awaitable[Manifest | None]: ...


@dataclass(frozen=True, slots=True)
class Response:
    """A response sampled outside training: N tokens with their log-probabilities and their text."""

    text: str
    prompt_token_ids: list[int]
    token_ids: list[int]
    logprobs: list[float]


class RolloutActor:
    """Samples for training while `run` runs, and for evaluation, preferences and chat on request.

    `environments` are keyed by task; prompts of other tasks get single responses. Tests replace vLLM by `build_engine`
    and Ray's object store by `fetch_tensors`.
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
        self._fetch_tensors = fetch_tensors or fetch_published
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
        self._options = SamplingOptions()
        self._stopping = asyncio.Event()
        self._run: asyncio.Future[None] | None = None
        self._rewards: RewardClient | None = None

    async def start(self) -> None:
        """Load the tokenizer, build the engine in its thread, and return when it is warm."""
        self._tokenizer = await asyncio.to_thread(
            PromptTokenizer,
            self._model_path,
            max_prompt_tokens=self._config.max_prompt_tokens,
            keep_special_tokens=self._config.keep_special_tokens,
            stop=self._config.stop,
        )
        self._options = await asyncio.to_thread(sampling_options, self._config, self._tokenizer.tokenizer)
        limit = self._config.max_response_tokens
        self._conversations = {
            task: Conversations(
                environment,
                self._tokenizer,
                self._engine,
                choose_parsers(Path(self._model_path), environment),
                max_response_tokens=limit,
                options=self._options,
            )
            for task, environment in self._environments.items()
            if environment.path is not None
        }
        await self._engine.start()

    async def is_ready(self) -> bool:
        """Return whether a weight version is loaded.

        The health check: answers at the engine thread's next turn.
        """
        return await self._engine.turn() > UNLOADED_VERSION

    async def preload(self, rewards: RewardClient) -> None:
        """No-op. Unpickling the argument imports the reward client while the engine starts."""

    async def run(self, queue: ProducerQueue, weights: Weights, rewards: RewardClient) -> None:
        """Sample for training until `stop` is called.

        Raises the error of the first part that fails: engine, weights, rewards or queue.
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
            self._stopping.clear()
            self._run.set_result(None)

    async def stop(self) -> None:
        """Stop admitting, cancel active responses, return the groups to the queue, and let `run` return.

        If this call arrives before that of `run`, `run` returns as soon as it starts.
        """
        self._stopping.set()
        if self._run is not None and not self._run.done():
            await asyncio.shield(self._run)

    async def _pull_weights(self, weights: Weights) -> None:
        """Fetch each new version and offer it to the engine thread. Does not return.

        Waits for the weight store; its `publish` ends the wait.
        """
        key: tuple[str, int] | None = None
        while True:
            manifest = await weights.wait_other(key, timeout_s=PULL_WAIT_S)
            if manifest is not None:
                manifest, tensors = await self._fetch(weights, manifest)
                self._engine.offer_weights(manifest, tensors)
                key = (manifest.incarnation, manifest.version)

    async def _fetch(self, weights: Weights, manifest: Manifest) -> tuple[Manifest, Mapping[str, torch.Tensor]]:
        """Return the newest version and its tensors.

        If a failed learner took the tensors with it, waits up to FLOOR_TIMEOUT_S until the next learner publishes them
        again, then raises WeightsLost.
        """
        give_up_at = time.monotonic() + FLOOR_TIMEOUT_S
        while True:
            try:
                return manifest, await asyncio.to_thread(self._fetch_tensors, manifest)
            except WeightsLost:
                if time.monotonic() > give_up_at:
                    raise
            await asyncio.sleep(LOST_WAIT_S)
            manifest = await weights.wait_other(None, timeout_s=PULL_WAIT_S) or manifest

    async def _admit_groups(self, queue: ProducerQueue, rewards: RewardClient) -> None:
        """Sample `num_concurrent_groups` groups concurrently and prefetch half as many more.

        Waits for tickets (the queue grants them when a version is published or a group is returned), finished groups,
        failed deliveries, and `stop`. Returns after it has returned its groups to the queue.
        """
        num_ahead = self._config.num_concurrent_groups // 2
        deliveries = Deliveries(self._tokenizer, queue, rewards)
        partials = PartialsSender(self._name, queue)
        groups = GroupSampling(
            self._name,
            self._config,
            self._engine,
            self._tokenizer,
            self._conversations,
            queue=queue,
            partials=partials,
            deliveries=deliveries,
            options=self._options,
        )
        active: set[asyncio.Future[Any]] = set()
        stopping = asyncio.ensure_future(self._stopping.wait())
        failing = asyncio.ensure_future(deliveries.failed())
        saving = asyncio.ensure_future(partials.send_periodically())
        admission: asyncio.Future[list[Ticket]] | None = None
        try:
            while not self._stopping.is_set():
                max_groups = self._config.num_concurrent_groups + num_ahead - len(active)
                if admission is None and max_groups >= max(1, num_ahead):
                    admission = asyncio.ensure_future(
                        queue.admit(self._name, max_groups=max_groups, timeout_s=ADMIT_WAIT_S)
                    )
                if not active:
                    deliveries.flush()
                waits = {stopping, failing, saving, *active, *([admission] if admission else [])}
                done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
                for task in done & {failing, saving, *active}:
                    task.result()
                active -= done
                if admission is not None and admission.done():
                    tickets, admission = admission.result(), None
                    active |= groups.start(tickets)
        finally:
            await cancelled({stopping, failing, saving, *active})
            await deliveries.cancel()
            if admission is not None:
                await asyncio.gather(admission, return_exceptions=True)
        if admission is not None:
            admission.result()
        await partials.send()
        await queue.hand_over(self._name)

    def _sample(
        self, uid: str, prompt_token_ids: Sequence[int], temperature: float, min_policy_version: int
    ) -> Awaitable[SampledResponse]:
        limit = self._config.max_response_tokens
        return self._engine.sample(
            ResponseRequest(uid, prompt_token_ids, limit, temperature, min_policy_version, options=self._options)
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
        """Sample `num` responses to each prompt, outside training. The same seed gives the same responses.

        Waits until weights of at least `min_policy_version` are loaded, if it is given.
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
        contexts = [prompt for prompt in encoded for _ in range(num)]
        texts = self._tokenizer.decode([s.token_ids for s in sampled], contexts)
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
        """Return `num` conversations for each data row: single turns, or with the task's environment.

        Raises EnvironmentFault if the environment breaks the protocol.
        """
        settings: dict[str, Any] = {"temperature": temperature, "min_policy_version": min_policy_version}
        conversations = self._conversations.get(task)
        if conversations is None:
            rows = [self._tokenizer.ready(row) for row in rows]
            sampled = await self.sample([row["prompt"] for row in rows], seed=seed, num=num, **settings)
            return [[_single_answer(row["prompt"], r) for r in group] for row, group in zip(rows, sampled, strict=True)]
        if min_policy_version is None:
            settings["min_policy_version"] = UNLOADED_VERSION
        answers = await asyncio.gather(
            *(
                conversations.run(f"sample-{seed}-{i}-{j}", row, seed=environment_seed(f"{seed}-{i}"), **settings)
                for i, row in enumerate(rows)
                for j in range(num)
            )
        )
        return [answers[i * num : (i + 1) * num] for i in range(len(rows))]

    async def complete(self, requests: Sequence[SamplingRequest], *, with_options: bool = False) -> list[list[int]]:
        """Return the tokens that continue each request, sampled with its seed and the loaded weights.

        `with_options` applies stop texts and top_p, top_k and min_p; a replay samples segments again without them.
        """
        options = self._options if with_options else SamplingOptions()
        completions = [
            ResponseRequest(r.id, r.token_ids, r.max_tokens, r.temperature, seed=r.seed, options=options)
            for r in requests
        ]
        sampled = await asyncio.gather(*map(self._engine.sample, completions))
        return [response.token_ids for response in sampled]

    async def load_published(self, manifest: Manifest) -> None:
        """Load a published version without a proof. For use outside `run`."""
        tensors = await asyncio.to_thread(self._fetch_tensors, manifest)
        await self._engine.load(tensors, version=manifest.version)

    async def load_policy(self, path: str, *, version: int = UNLOADED_VERSION) -> None:
        """Load the weights of a Hugging Face folder under the label `version`. For use outside `run`.

        Raises InputError if the folder contains no safetensors, EngineError while `run` runs.
        """
        if self._run is not None and not self._run.done():
            raise EngineError(
                self._name, "cannot load a policy from a folder while it samples for training: stop the run first"
            )
        await self._engine.load(await asyncio.to_thread(read_policy, Path(path)), version=version)

    async def loaded(self, version: int) -> None:
        """Wait until weights of at least `version` are loaded."""
        await self._engine.loaded(version)

    async def logprobs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Return the log-probability of each token but the first given its prefix, at temperature 1."""
        return await self._engine.logprobs(sequences)

    async def missing_rewards(self) -> str | None:
        """Return which rewards are overdue and why, or None."""
        return self._rewards.waiting() if self._rewards is not None else None

    async def metrics(self) -> dict[str, Any]:
        """Return the totals of the engine thread since its start; see `SamplingMetrics`."""
        return self._engine.metrics()

    async def take_intervals(self) -> list[tuple[int, float, float]]:
        """Return when tokens were sampled since the last call; see `EngineThread.take_intervals`."""
        return self._engine.take_intervals()

    async def close(self) -> None:
        """Stop `run` if it runs, then close environments and engine."""
        if self._run is not None and not self._run.done():
            await self.stop()
        for conversations in self._conversations.values():
            await conversations.close()
        await self._engine.close()


def _single_answer(prompt: str, response: Response) -> Conversation:
    sampled = SampledResponse("", response.token_ids, response.logprobs, [], "stop")
    return replace(single_turn(prompt, response.prompt_token_ids, sampled), response=response.text)
