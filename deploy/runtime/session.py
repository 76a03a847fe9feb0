"""What the stages of one command share: Ray, rollout actors, reward service. Each starts when it is first needed.

Engines take half a minute to start, so PPO and the evaluation reuse the actors that sampled the preferences.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import secrets
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray

from cluster.actors.health import Health, State
from cluster.actors.pool import ActorPool
from cluster.actors.remote import RemoteActor, kill_actor, process_of, start_actor, stream_task, within
from cluster.errors import ActorDied, InputError
from cluster.files import read_json
from cluster.user_code import python_path
from deploy.config.inputs import dtype_of_weights
from deploy.config.schema import RunConfig
from deploy.run.directory import RunDirectory
from deploy.run.layout import FEEDBACK
from deploy.run.metrics_log import MetricsLog
from deploy.run.reward_models import published_folder
from deploy.runtime.connect import answers
from deploy.runtime.host import prepare_host, ray_folder
from deploy.runtime.processes import MARKER, Reaper
from deploy.runtime.signals import signals_kept_from_children
from deploy.runtime.startup import StartUp
from deploy.terminal.view import View
from reward_service.client.retrying import RetryingRewardClient
from reward_service.client.run import run_client
from reward_service.config.service import NO_SCORER, RewardServiceConfig
from reward_service.feedback.selection import FeedbackSettings
from reward_service.http.tokens import with_tokens
from reward_service.serving.application import http_server_ended, start_reward_service, stop_reward_service
from rollout_actors.actor import Response, RolloutActor
from rollout_actors.conversations.conversation import Conversation

SPARE_ACTORS = 4
SYSTEM_CONFIG = {"task_events_report_interval_ms": 0}
"""For a Ray that we start: do not collect task events (unused, 10 MiB per minute)."""
SPIN_COUNT = "1000"
"""How often an OpenMP thread looks for work before it sleeps. By default it spins on the core that another thread
needs: on two busy cores a step of two threads took five times as long."""
PROMPTS_A_CALL = 256
OnStep = Callable[[str, Mapping[str, Any]], None]
"""Called with a stage's name and the metrics of one of its steps."""
TOTALS = (
    "num_sampled_tokens",
    "busy_s",
    "swap_s",
    "prefill_again_s",
    "num_swaps_proved",
    "num_swaps_checksum_only",
)


class Session:
    """Owns everything that one command starts; `close` stops all of it.

    `reward_client` makes a client of the reward service; by default that of the run's settings.
    """

    def __init__(
        self,
        config: RunConfig,
        run: RunDirectory,
        view: View,
        *,
        on_step: OnStep | None = None,
        reward_client: Callable[[], RetryingRewardClient] | None = None,
    ) -> None:
        self.config = config
        self.run = run
        self.view = view
        self.start_up = StartUp(run, view)
        self.name = run.name_on_ray(config.run.name) if run.is_locked else f"{config.run.name}-{secrets.token_hex(4)}"
        """The name of what this command registers with Ray; other commands and runs on this Ray have other names."""
        self.pool = ActorPool(
            self._start_rollout_actor,
            self.stop_actor,
            name="rollout",
            max_restarts=config.rollout_actors.max_restarts,
            note=view.note,
            health=Health(
                lambda actor: actor.is_ready(),
                timeout_s=config.rollout_actors.probe_timeout_s,
                setting="rollout_actors.probe_timeout_s",
                note=view.note,
            ),
        )
        self.reaper = Reaper(view.note)
        self._owns_ray = False
        self._engine_path: Path | None = None
        self._log = MetricsLog(run.path)
        self._rollout_metrics: dict[str, dict[str, float]] = {}
        self._sampled_before: tuple[float, float] = (0, time.monotonic())
        self._tokens_per_s = 0.0
        self._on_step = on_step
        self._new_reward_client = reward_client or self._client_of_the_service
        self._reward_client: RetryingRewardClient | None = None
        self._has_service = False
        self._service_ready = asyncio.Event()

    def connect(self) -> str:
        """Start a local Ray, or join the one that RAY_ADDRESS names; returns its address.

        Raises InputError if this process is connected to a Ray already, or if no Ray answers at RAY_ADDRESS.
        """
        if ray.is_initialized():
            raise InputError("ray", "this process is connected to a Ray already (call ray.shutdown() first)")
        prepare_host()
        sys.path.insert(0, os.getcwd())
        address = os.environ.get("RAY_ADDRESS")
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        self._owns_ray = not address
        if self._owns_ray:
            options |= {"num_cpus": self._num_cpus(), "include_dashboard": False, "_system_config": SYSTEM_CONFIG}
            options |= {"_temp_dir": folder} if (folder := ray_folder()) else {}
        env = {
            "PYTHONPATH": python_path(),
            "GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", SPIN_COUNT),
        }
        if self._owns_ray:
            env[MARKER] = self.reaper.session_id
        if address and address != "auto" and not answers(address):
            raise InputError(address, "no Ray answers at this address (RAY_ADDRESS)")
        with self.start_up.phase("ray"), signals_kept_from_children():
            ray.init(address or "local", runtime_env={"env_vars": env}, **options)
        return str(ray.get_runtime_context().gcs_address)

    def _num_cpus(self) -> int:
        """Return enough CPUs, as Ray counts them, for every part and for actors that join later."""
        config = self.config
        needed = (
            max(config.rollout_actors.num_actors + SPARE_ACTORS, config.rollout_actors.max_actors or 0)
            * config.rollout_actors.num_cpus
            + config.learner.num_learners * config.learner.num_cpus
            + config.reward_service.num_replicas * config.reward_service.num_cpus
        )
        return max(os.cpu_count() or 1, math.ceil(needed))

    def log_path(self, name: str) -> Path:
        """Return the log file of the process of that name."""
        return self.run.path / "logs" / f"{name}.log"

    async def run_task(
        self,
        function: Callable[..., Iterator[Any]],
        *args: Any,
        name: str,
        log_name: str | None = None,
        **kwargs: Any,
    ) -> list[Any]:
        """Run a generator function in a separate process; returns the values that it yields."""
        log_path = self.log_path(log_name or name)
        return [value async for value in stream_task(function, *args, name=name, log_path=log_path, **kwargs)]

    async def rollout_actors(self, num: int, policy_path: Path) -> Sequence[RemoteActor]:
        """Return at least `num` ready rollout actors. Actors that start now load the weights of `policy_path`."""
        self._engine_path = policy_path
        if len(self.pool.actors) < num:
            with self.start_up.phase("rollout_actors"):
                await self.pool.fill(num)
        return self.pool.actors

    async def _start_rollout_actor(self, name: str) -> RemoteActor:
        assert self._engine_path is not None
        settings = self.config.rollout_actors
        actor = start_actor(
            RolloutActor,
            name,
            settings,
            model_path=str(self._engine_path),
            dtype=dtype_of(self.config, self._engine_path),
            seed=self.config.run.seed,
            environments={self.config.recorded_as(name): t.environment for name, t in self.config.by_task().items()},
            name=name,
            log_path=self.log_path(name),
            num_cpus=settings.num_cpus,
            num_gpus=settings.num_gpus,
        )
        await within(
            self._get_ready(actor),
            settings.start_timeout_s,
            where=name,
            waited_for="its engine to start (rollout_actors.start_timeout_s)",
        )
        return actor

    async def _get_ready(self, actor: RemoteActor) -> None:
        await self.start_engine(actor)
        node, pid = await process_of(actor)
        if node == ray.get_runtime_context().get_node_id():
            self.reaper.remember(actor.name, pid)

    async def start_engine(self, actor: RemoteActor) -> None:
        """Start the engine while the actor imports the reward client.

        A deadline must wrap this coroutine, not the `gather`: asyncio prints the exception of a `gather` that
        `wait_for` cancels, since no code retrieves it.
        """
        await asyncio.gather(actor.start(), actor.preload(self._new_reward_client()))

    async def stop_actor(self, actor: RemoteActor) -> None:
        """Kill an actor; its process is waited for in the background, so that a run need not wait."""
        kill_actor(actor)
        self.reaper.end_later(actor.name)

    async def rewards(self) -> RetryingRewardClient:
        """Return a client of the run's reward service, started by the first call, or of `reward_service.url`."""
        if self._reward_client is None:
            config = self.config.served()
            with self.start_up.phase("reward_service"):
                if config.url is None and config.scorer != NO_SCORER:
                    self._has_service = True
                    await self._start_reward_service(config)
                    self._service_ready.set()
                self._reward_client = self._new_reward_client()
                await self._reward_client.score([])
        return self._reward_client

    async def _start_reward_service(self, config: RewardServiceConfig) -> None:
        """Start it in a thread. If cancelled, wait for the thread: after Ray's end, Serve would start another Ray."""
        cancelled = threading.Event()

        def start() -> None:
            start_reward_service(
                with_tokens(config, self.run.path),
                name=self.name,
                reward_model_path=published_folder(self.run.path) if config.needs_reward_model() else None,
                token=os.environ.get("ANTIPHON_TOKEN"),
                log_path=self.log_path("reward_service"),
                feedback_path=self.run.path / FEEDBACK,
                feedback=FeedbackSettings(seed=self.config.run.seed),
                cancelled=cancelled,
            )

        starting = asyncio.ensure_future(asyncio.to_thread(start))
        try:
            await asyncio.shield(starting)
        except asyncio.CancelledError:
            cancelled.set()
            await asyncio.gather(starting, return_exceptions=True)
            raise

    async def follow_service(self) -> None:
        """Wait until the run's reward service stops serving its port; raises InputError if it lost the port."""
        await self._service_ready.wait()
        await http_server_ended(self.name)

    def missing_rewards(self) -> str | None:
        """Return which rewards this process waits for, or None."""
        return self._reward_client.waiting() if self._reward_client is not None else None

    def _client_of_the_service(self) -> RetryingRewardClient:
        token = os.environ.get("ANTIPHON_TOKEN") or None
        scorers = {name: task.scorer for name, task in self.config.tasks.items()}
        return run_client(self.config.served(), self.name, token, scorers)

    async def sample(
        self,
        prompts: Sequence[str],
        policy: Path,
        *,
        num: int,
        seed: str,
        progress: Callable[[int], None] = lambda num_done: None,
    ) -> list[list[Response]]:
        """Sample `num` responses of the policy in that folder to each prompt, at the training temperature.

        Requests are split and sent concurrently to keep the engine busy; `progress` is called with the number of
        finished prompts.
        """
        sampled: list[list[Response]] = await self._in_parts("sample", prompts, policy, progress, num=num, seed=seed)
        return sampled

    async def answer(
        self,
        rows: Sequence[Mapping[str, Any]],
        policy: Path,
        *,
        task: str,
        num: int,
        seed: str,
        temperature: float | None = None,
    ) -> list[list[Conversation]]:
        """Return `num` conversations of the policy in that folder about each row, single-turn without environment."""
        recorded_as = self.config.recorded_as(task)
        conversations: list[list[Conversation]] = await self._in_parts(
            "answer", rows, policy, num=num, seed=seed, temperature=temperature, task=recorded_as
        )
        return conversations

    async def _in_parts(
        self,
        method: str,
        requests: Sequence[Any],
        policy: Path,
        progress: Callable[[int], None] = lambda num_done: None,
        *,
        num: int,
        seed: str,
        temperature: float | None = None,
        **settings: str,
    ) -> list[Any]:
        await self._load(policy)
        if temperature is None:
            temperature = self.config.rollout_actors.temperature
        num_done = 0

        async def ask(first: int) -> list[Any]:
            nonlocal num_done
            part = list(requests[first : first + PROMPTS_A_CALL])
            answers: list[Any] = await self.pool.ask(
                method, part, num=num, seed=f"{seed}-{first}", temperature=temperature, **settings
            )
            num_done += len(part)
            progress(num_done)
            return answers

        parts = await asyncio.gather(*map(ask, range(0, len(requests), PROMPTS_A_CALL)))
        return [answers for part in parts for answers in part]

    async def logprobs(self, sequences: Sequence[Sequence[int]], policy: Path) -> list[list[float]]:
        """Return the log-probability of each token but the first of each sequence under the policy in that folder."""
        await self._load(policy)
        logprobs: list[list[float]] = await self.pool.ask("logprobs", [list(ids) for ids in sequences])
        return logprobs

    async def _load(self, policy: Path) -> None:
        await self.rollout_actors(1, policy)
        await self.pool.ask("load_policy", str(policy))

    async def rollout_totals(self) -> dict[str, float]:
        """Return totals over all rollout actors, including removed ones; of one that died, up to its last answer."""
        for actor in list(self.pool.actors):
            try:
                self._rollout_metrics[actor.name] = await actor.metrics()
            except ActorDied as error:
                self.view.note(str(error))
        return {key: sum(metrics[key] for metrics in self._rollout_metrics.values()) for key in TOTALS}

    async def rollout_metrics(self) -> dict[str, float]:
        """Return the totals, the number of actors and the tokens/s since the last call, or before if there are none."""
        totals = await self.rollout_totals()
        now = time.monotonic()
        num_tokens, since = self._sampled_before
        num_new = totals["num_sampled_tokens"] - num_tokens
        self._sampled_before = (totals["num_sampled_tokens"], now)
        if num_new > 0:
            self._tokens_per_s = num_new / (now - since)
        return {
            "rollout_actors/num_actors": len(self.pool.actors),
            "rollout_actors/num_healthy": self.pool.health.num(State.HEALTHY) if self.pool.health else 0,
            "rollout_actors/tokens_per_s": self._tokens_per_s,
            **{f"rollout_actors/{key}": value for key, value in totals.items()},
        }

    def log_step(self, stage: str, metrics: Mapping[str, Any]) -> None:
        """Write one step's row of metrics.jsonl, show it, and call `on_step` with the stage and the metrics."""
        self.record(stage, metrics)
        self.view.step(metrics)
        if self._on_step is not None:
            self._on_step(stage, metrics)

    def record(self, stage: str, metrics: Mapping[str, Any]) -> None:
        """Write one row of metrics.jsonl."""
        self._log.write({"stage": stage, **metrics})

    async def close(self) -> None:
        """Stop every process that this command started; a Ray that it joined keeps running.

        Processes that hang in their exit are killed and named in a note.
        """
        self._log.close()
        if self._reward_client is not None:
            await self._reward_client.aclose()
        if not ray.is_initialized():
            return
        await self.pool.close()
        if self._has_service:
            await asyncio.to_thread(stop_reward_service, self.name)
        await asyncio.to_thread(ray.shutdown)
        if self._owns_ray:
            await self.reaper.end_all()
        await self.reaper.close()


def dtype_of(config: RunConfig, policy: Path) -> str:
    """Return the dtype of engine and learner; for `auto`, that of the weights. Raises InputError for float16."""
    if config.model.dtype != "auto":
        return config.model.dtype
    return dtype_of_weights(read_json(policy / "config.json"), policy)
