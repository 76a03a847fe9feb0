"""The thread that owns an engine, and the async methods by which an event loop uses it.

Each turn of the thread runs new commands, swaps to newer weights if they have arrived, steps the engine and returns the
responses that finished. A swap interrupts the active responses and continues each from prompt + partial response, so a
segment ends at a swap, and also after `max_segment_tokens`. Imports neither Ray nor vLLM.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from cluster.errors import AntiphonError, EngineError, InputError
from cluster.trajectory import PartialResponse
from cluster.weights.manifest import Manifest
from rollout_actors.engine.metrics import Intervals, SamplingMetrics
from rollout_actors.engine.protocol import UNLOADED_VERSION, GenerationEngine, Sampled
from rollout_actors.engine.response import ActiveRequest, ResponseRequest, SampledResponse
from rollout_actors.engine.swap_check import SwapProof, Verdict

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class _Weights:
    """All tensors of a version. Weights without a manifest, such as those of a folder, are not proved."""

    version: int
    tensors: Mapping[str, torch.Tensor]
    manifest: Manifest | None


class EngineThread:
    """Owns one engine in one thread. Call the public methods only in the event loop that called `start`.

    An exception in the thread ends the thread and is raised by all pending calls and by `ended`: an AntiphonError as it
    is, any other as EngineError. An InputError of `add` or `logprobs` is raised by its own call only. The thread calls
    `before_step` before each step.
    """

    def __init__(
        self,
        build: Callable[[], GenerationEngine],
        *,
        name: str,
        dtype: str,
        before_step: Callable[[], None] = lambda: None,
    ) -> None:
        self._build = build
        self._name = name
        self._before_step = before_step
        self._proof = SwapProof(name, dtype)
        self._thread = threading.Thread(target=self._own_engine, name=f"engine of {name}", daemon=True)
        self._wake = threading.Condition()
        # Shared by thread and event loop, guarded by _wake:
        self._inbox: list[Callable[[], None]] = []
        self._offered: _Weights | None = None
        self._closing = False
        self._failure: AntiphonError | None = None
        self._intervals = Intervals()
        # Used by the thread only:
        self._ids = itertools.count()
        self._version = UNLOADED_VERSION
        self._active: dict[str, ActiveRequest] = {}
        self._waiting: deque[ActiveRequest] = deque()
        self._prefilling_again: set[str] = set()
        self._version_waiters: list[tuple[int, asyncio.Future[Any]]] = []
        self._metrics = SamplingMetrics()
        # Used by the event loop only:
        self._open: set[asyncio.Future[Any]] = set()

    # Methods of the event loop.

    async def start(self) -> None:
        """Build the engine in its thread and return when it is warm. Raises what building it raised."""
        self._loop = asyncio.get_running_loop()
        self._started: asyncio.Future[None] = self._new_future()
        self._ended: asyncio.Future[None] = self._loop.create_future()
        self._thread.start()
        await self._started

    async def sample(self, request: ResponseRequest) -> SampledResponse:
        """Sample one response, once weights of at least its `min_policy_version` are loaded.

        Cancelling the call cancels the request.
        """
        active = ActiveRequest(request, self._new_future())
        self._put(lambda: self._waiting.append(active))
        try:
            return await active.future
        except asyncio.CancelledError:
            if self._failure is None:
                self._put(lambda: self._forget(active))
            raise

    def offer_weights(self, manifest: Manifest, tensors: Mapping[str, torch.Tensor]) -> None:
        """Load and prove this version before the next step, unless a newer one is offered before."""
        self._offer(_Weights(manifest.version, tensors, manifest))

    async def load(self, tensors: Mapping[str, torch.Tensor], *, version: int) -> None:
        """Load weights under the label `version`, without a proof: they have no manifest."""
        future = self._new_future()

        def swap() -> None:
            self._swap(_Weights(version, tensors, None))
            self._resolve([(future, None)])

        self._put(swap)
        await future

    async def forget_version(self) -> None:
        """Remove the label of the loaded weights: requests wait for the next version that is offered."""
        future = self._new_future()

        def forget() -> None:
            self._version = self._metrics.policy_version = UNLOADED_VERSION
            self._resolve([(future, None)])

        self._put(forget)
        await future

    async def loaded(self, version: int) -> None:
        """Wait until weights of at least `version` are loaded. The swap that loads them ends the wait."""
        if version <= self._metrics.policy_version:
            return
        future = self._new_future()
        self._put(lambda: self._await_version(version, future))
        await future

    async def turn(self) -> int:
        """Wait for the next turn of the thread and return the version that is loaded then."""
        future: asyncio.Future[int] = self._new_future()
        self._put(lambda: self._resolve([(future, self._version)]))
        return await future

    async def logprobs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Return the log-probability of each token but the first given its prefix, at temperature 1."""
        future: asyncio.Future[list[list[float]]] = self._new_future()

        def score() -> None:
            try:
                self._resolve([(future, self._engine.logprobs(sequences))])
            except InputError as error:
                self._refuse(future, error)

        self._put(score)
        return await future

    def metrics(self) -> dict[str, Any]:
        """Return the totals so far, by name; see `SamplingMetrics`."""
        return asdict(self._metrics)

    def take_intervals(self) -> list[tuple[int, float, float]]:
        """Return the spans (policy version, start, end) since the last call in which tokens were sampled.

        Seconds of this machine's monotonic clock. Spans less than 20 ms apart are merged.
        """
        with self._wake:
            return self._intervals.take()

    async def ended(self) -> None:
        """Wait until the thread ends, then raise the error that ended it, if any."""
        await asyncio.shield(self._ended)

    async def close(self) -> None:
        """Stop after the current step, close the engine and wait until the thread has ended."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if self._thread.is_alive():
            await asyncio.to_thread(self._thread.join)

    def _new_future(self) -> asyncio.Future[Any]:
        if self._failure is not None:
            raise self._failure
        future = self._loop.create_future()
        self._open.add(future)
        future.add_done_callback(self._open.discard)
        return future

    def _put(self, command: Callable[[], None]) -> None:
        with self._wake:
            self._inbox.append(command)
            self._wake.notify()

    def _offer(self, weights: _Weights) -> None:
        with self._wake:
            self._offered = weights
            self._wake.notify()

    def _fail_all(self, failure: AntiphonError | None) -> None:
        """End all pending calls after the thread has ended. Runs in the event loop."""
        reason = failure or EngineError(self._name, "the engine was closed")
        self._failure = reason
        for future in list(self._open):
            if not future.done():
                future.set_exception(reason)
        if failure is None:
            self._ended.set_result(None)
        else:
            self._ended.set_exception(failure)
            self._ended.exception()

    # Methods of the engine thread.

    def _own_engine(self) -> None:
        """Run new commands, swap to newer weights if there are any, step, return finished responses; repeat.

        Waits only while the engine has no work, until `_put`, `_offer` or `close` wakes the thread.
        """
        failure: AntiphonError | None = None
        try:
            self._engine = self._build()
            self._resolve([(self._started, None)])
            while self._take_new():
                self._swap_if_newer()
                self._submit_waiting()
                if self._engine.has_work():
                    self._step()
            self._engine.close()
        except AntiphonError as error:
            failure = error
        except Exception as error:  # noqa: BLE001  top of the thread: all pending calls raise it
            failure = EngineError(self._name, f"the engine failed: {type(error).__name__}: {error}")
            failure.__cause__ = error
        self._loop.call_soon_threadsafe(self._fail_all, failure)

    def _take_new(self) -> bool:
        """Run the commands in the inbox. Returns False if the thread must end."""
        with self._wake:
            while not (self._inbox or self._offered or self._closing or self._engine.has_work()):
                self._wake.wait()
            commands, self._inbox = self._inbox, []
        for command in commands:
            command()
        return not self._closing

    def _swap_if_newer(self) -> None:
        with self._wake:
            offered, self._offered = self._offered, None
        if offered is not None:
            self._swap(offered)

    def _swap(self, weights: _Weights) -> None:
        """Interrupt the active responses, load and prove the weights.

        `_submit_waiting` continues the responses.
        """
        started = time.monotonic()
        self._interrupt()
        self._engine.load(weights.tensors, version=weights.version)
        if weights.manifest is not None:
            self._prove(weights.manifest)
        self._version = self._metrics.policy_version = weights.version
        self._metrics.swap_s += time.monotonic() - started
        waiters, self._version_waiters = self._version_waiters, []
        for version, future in waiters:
            self._await_version(version, future)

    def _interrupt(self) -> None:
        self._engine.abort(list(self._active))
        closed: list[tuple[ActiveRequest, str | None]] = []
        for response in reversed(self._active.values()):
            if response.end_segment(self._version, self._name):
                closed.append((response, None))
            self._waiting.appendleft(response)
        self._report_closed(closed)
        self._active.clear()
        self._prefilling_again.clear()

    def _prove(self, manifest: Manifest) -> None:
        verdict = self._proof.check(manifest, self._engine.logprobs(manifest.probe_token_ids))
        self._metrics.num_swaps_proved += verdict is Verdict.PROVED
        self._metrics.num_swaps_checksum_only += verdict is Verdict.CHECKSUM_ONLY

    def _await_version(self, version: int, future: asyncio.Future[Any]) -> None:
        if version <= self._version:
            self._resolve([(future, None)])
        else:
            self._version_waiters.append((version, future))

    def _submit_waiting(self) -> None:
        """Submit every waiting response that may be sampled with the loaded version."""
        still_waiting = deque[ActiveRequest]()
        for response in self._waiting:
            if response.request.min_policy_version <= self._version:
                self._submit(response)
            else:
                still_waiting.append(response)
        self._waiting = still_waiting

    def _submit(self, response: ActiveRequest) -> None:
        id_ = str(next(self._ids))
        request = response.next_segment(id_)
        if response.token_ids:
            self._metrics.num_prefilled_again_tokens += len(request.token_ids)
            self._prefilling_again.add(id_)
        try:
            self._engine.add(request)
        except InputError as error:
            self._prefilling_again.discard(id_)
            self._refuse(response.future, error)
        else:
            self._active[id_] = response

    def _refuse(self, future: asyncio.Future[Any], error: InputError) -> None:
        """Raise the engine's refusal of one request from its call; the other calls continue."""
        self._loop.call_soon_threadsafe(_set_error, future, error)

    def _forget(self, response: ActiveRequest) -> None:
        if response in self._waiting:
            self._waiting.remove(response)
        ids = [id_ for id_, active in self._active.items() if active is response]
        for id_ in ids:
            del self._active[id_]
            self._prefilling_again.discard(id_)
        self._engine.abort(ids)

    def _step(self) -> None:
        self._before_step()
        started = time.monotonic()
        sampled = self._engine.step()
        ended = time.monotonic()
        self._metrics.busy_s += ended - started
        if self._prefilling_again:
            self._metrics.prefill_again_s += ended - started
        with self._wake:
            self._intervals.add(self._version, started, ended)
        self._store(sampled)

    def _store(self, sampled: Sequence[Sampled]) -> None:
        """Store the new tokens, and resolve the finished responses with one wake-up of the event loop."""
        finished: list[tuple[asyncio.Future[Any], Any]] = []
        closed: list[tuple[ActiveRequest, str | None]] = []
        for new in sampled:
            response = self._active[new.id]
            is_stopped = response.add(new.token_ids, new.logprobs)
            self._metrics.num_sampled_tokens += len(new.token_ids)
            self._prefilling_again.discard(new.id)
            if is_stopped and new.finish_reason is None:
                self._engine.abort([new.id])
            reason = "stop" if is_stopped else new.finish_reason
            if reason is not None:
                del self._active[new.id]
                response.end_segment(self._version, self._name)
                if response.is_finished(reason):
                    closed.append((response, reason))
                    finished.append((response.future, response.finished(reason)))
                else:
                    closed.append((response, None))
                    self._submit(response)
        self._metrics.num_responses += len(finished)
        self._report_closed(closed)
        if finished:
            self._resolve(finished)

    def _report_closed(self, closed: Sequence[tuple[ActiveRequest, str | None]]) -> None:
        """Call `on_closed` for every finished segment; the last one carries the finish reason."""
        calls = [
            (active.request.on_closed, active.partial(reason))
            for active, reason in closed
            if active.request.on_closed is not None
        ]
        if calls:
            self._loop.call_soon_threadsafe(_call_all, calls)

    def _resolve(self, results: Sequence[tuple[asyncio.Future[Any], Any]]) -> None:
        self._loop.call_soon_threadsafe(_set_results, results)


def _call_all(calls: Sequence[tuple[Callable[[PartialResponse], None], PartialResponse]]) -> None:
    for on_closed, partial in calls:
        on_closed(partial)


def _set_error(future: asyncio.Future[Any], error: InputError) -> None:
    if not future.done():
        future.set_exception(error)


def _set_results(results: Sequence[tuple[asyncio.Future[Any], Any]]) -> None:
    for future, result in results:
        if not future.done():
            future.set_result(result)
