"""The one thread that owns an engine, and its asyncio face.

Around the thread, asyncio tasks submit requests and await responses. The thread takes what is new, swaps when newer
weights are whole, steps, and hands on what finished; a swap interrupts the responses under way and continues each
from prompt + partial response, so it is a segment boundary, and so is every so many tokens. Knows neither tickets,
rewards nor Ray.
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

from cluster.errors import AntiphonError, EngineError
from cluster.trajectory import PartialResponse
from cluster.weights.manifest import Manifest
from rollout_actors.engine.metrics import Intervals, SamplingMetrics
from rollout_actors.engine.protocol import UNLOADED_VERSION, GenerationEngine, Sampled
from rollout_actors.engine.response import ActiveRequest, SampledResponse
from rollout_actors.engine.swap_check import SwapProof, Verdict

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class _Weights:
    """A version that arrived whole; without a manifest it comes from a folder and is not proved."""

    version: int
    tensors: Mapping[str, torch.Tensor]
    manifest: Manifest | None


class EngineThread:
    """Owns one engine in one thread. All public methods belong to the event loop that called `start`.

    An exception in the thread fails everyone who waits, with EngineError or the AntiphonError it was, and ends the
    thread; `ended` tells. `before_step` is called in the thread before each step.
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
        # Shared, under _wake:
        self._inbox: list[Callable[[], None]] = []
        self._offered: _Weights | None = None
        self._closing = False
        self._failure: AntiphonError | None = None
        self._intervals = Intervals()
        # The thread's own:
        self._ids = itertools.count()
        self._version = UNLOADED_VERSION
        self._under_way: dict[str, ActiveRequest] = {}
        self._waiting: deque[ActiveRequest] = deque()
        self._prefilling_again: set[str] = set()
        self._version_waiters: list[tuple[int, asyncio.Future[Any]]] = []
        self._metrics = SamplingMetrics()
        # The event loop's own:
        self._open: set[asyncio.Future[Any]] = set()

    # The asyncio face.

    async def start(self) -> None:
        """Build the engine in its thread; returns when it is warm. Raises what building raised."""
        self._loop = asyncio.get_running_loop()
        self._started: asyncio.Future[None] = self._new_future()
        self._ended: asyncio.Future[None] = self._loop.create_future()
        self._thread.start()
        await self._started

    async def sample(
        self,
        uid: str,
        prompt_token_ids: Sequence[int],
        *,
        max_tokens: int,
        temperature: float,
        min_policy_version: int = UNLOADED_VERSION,
        seed: int | None = None,
        first_segment: int = 0,
        max_segment_tokens: int | None = None,
        begun: PartialResponse | None = None,
        on_closed: Callable[[PartialResponse], None] | None = None,
    ) -> SampledResponse:
        """Sample one response; waits until weights of at least `min_policy_version` are loaded.

        Cancelling the call forgets the response. The tokens depend on uid, prompt and weights alone; with a `seed`,
        which the first segment then has, on that and not on the uid. Segments count from `first_segment`, and have at
        most `max_segment_tokens`; `on_closed` hears whenever one is closed. What is `begun` is gone on with.
        """
        response = ActiveRequest(
            uid,
            list(prompt_token_ids),
            max_tokens,
            temperature,
            min_policy_version,
            self._new_future(),
            seed,
            first_segment,
            max_segment_tokens,
            on_closed,
        )
        if begun is not None:
            response.go_on_from(begun)
        self._put(lambda: self._waiting.append(response))
        try:
            return await response.future
        except asyncio.CancelledError:
            if self._failure is None:
                self._put(lambda: self._forget(response))
            raise

    def offer_weights(self, manifest: Manifest, tensors: Mapping[str, torch.Tensor]) -> None:
        """Hand over a version that arrived whole; loaded and proved before the next step, unless a newer one comes."""
        self._offer(_Weights(manifest.version, tensors, manifest))

    async def load(self, tensors: Mapping[str, torch.Tensor], *, version: int) -> None:
        """Load weights that come with no manifest, hence unproved, under the label `version`."""
        future = self._new_future()

        def swap() -> None:
            self._swap(_Weights(version, tensors, None))
            self._resolve([(future, None)])

        self._put(swap)
        await future

    async def forget_version(self) -> None:
        """Call the loaded weights by no version: floors wait for the next one that is offered."""
        future = self._new_future()

        def forget() -> None:
            self._version = self._metrics.policy_version = UNLOADED_VERSION
            self._resolve([(future, None)])

        self._put(forget)
        await future

    async def loaded(self, version: int) -> None:
        """Wait until weights of at least `version` are loaded; woken by the swap that loads them."""
        if version <= self._metrics.policy_version:
            return
        future = self._new_future()
        self._put(lambda: self._await_version(version, future))
        await future

    async def turn(self) -> int:
        """Wait until the thread has come round once more; the version that is loaded then."""
        future: asyncio.Future[int] = self._new_future()
        self._put(lambda: self._resolve([(future, self._version)]))
        return await future

    async def logprobs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """The engine's log-probabilities of each sequence's tokens given their prefix, the first left out."""
        future: asyncio.Future[list[list[float]]] = self._new_future()
        self._put(lambda: self._resolve([(future, self._engine.logprobs(sequences))]))
        return await future

    def metrics(self) -> dict[str, Any]:
        """Totals so far, by name."""
        return asdict(self._metrics)

    def take_intervals(self) -> list[tuple[int, float, float]]:
        """Spans (policy version, start, end) of this machine's monotonic clock in which tokens were sampled.

        Since the last call; seconds. Spans with pauses shorter than 20 ms between steps are one.
        """
        with self._wake:
            return self._intervals.take()

    async def ended(self) -> None:
        """Wait for the end of the thread; raises the error that ended it."""
        await asyncio.shield(self._ended)

    async def close(self) -> None:
        """Stop after the step under way, give the engine back and wait for the thread's end."""
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
        """Runs in the event loop when the thread has ended: nobody is left waiting for it."""
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

    # The engine thread.

    def _own_engine(self) -> None:
        """Take what is new, swap if newer weights are whole, step, hand on what finished.

        Consumes commands from the inbox and offered weights; waits only when the engine has no work, until `_put`,
        `_offer` or `close` wakes it.
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
        except Exception as error:  # noqa: BLE001  the thread's top: everyone who waits is told
            failure = EngineError(self._name, f"the engine failed: {type(error).__name__}: {error}")
            failure.__cause__ = error
        self._loop.call_soon_threadsafe(self._fail_all, failure)

    def _take_new(self) -> bool:
        """Run the commands that came in; False when the thread shall end."""
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
        """Interrupt what is under way, load, prove; the interrupted go on with `_submit_waiting`."""
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
        self._engine.abort(list(self._under_way))
        closed: list[tuple[ActiveRequest, str | None]] = []
        for response in reversed(self._under_way.values()):
            if response.end_segment(self._version, self._name):
                closed.append((response, None))
            self._waiting.appendleft(response)
        self._tell(closed)
        self._under_way.clear()
        self._prefilling_again.clear()

    def _prove(self, manifest: Manifest) -> None:
        verdict = self._proof.judge(manifest, self._engine.logprobs(manifest.probe_token_ids))
        self._metrics.num_swaps_proved += verdict is Verdict.PROVED
        self._metrics.num_swaps_checksum_only += verdict is Verdict.CHECKSUM_ONLY

    def _await_version(self, version: int, future: asyncio.Future[Any]) -> None:
        if version <= self._version:
            self._resolve([(future, None)])
        else:
            self._version_waiters.append((version, future))

    def _submit_waiting(self) -> None:
        """Give the engine every response whose floor the loaded version reaches."""
        still_waiting = deque[ActiveRequest]()
        for response in self._waiting:
            if response.min_policy_version <= self._version:
                self._submit(response)
            else:
                still_waiting.append(response)
        self._waiting = still_waiting

    def _submit(self, response: ActiveRequest) -> None:
        id_ = str(next(self._ids))
        request = response.request(id_)
        if response.token_ids:
            self._metrics.num_prefilled_again_tokens += len(request.token_ids)
            self._prefilling_again.add(id_)
        self._under_way[id_] = response
        self._engine.add(request)

    def _forget(self, response: ActiveRequest) -> None:
        if response in self._waiting:
            self._waiting.remove(response)
        ids = [id_ for id_, under_way in self._under_way.items() if under_way is response]
        for id_ in ids:
            del self._under_way[id_]
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
        self._hand_on(sampled)

    def _hand_on(self, sampled: Sequence[Sampled]) -> None:
        """Keep the new tokens; resolve the responses that finished, all with one wake-up of the event loop."""
        finished: list[tuple[asyncio.Future[Any], Any]] = []
        closed: list[tuple[ActiveRequest, str | None]] = []
        for new in sampled:
            response = self._under_way[new.id]
            response.token_ids += new.token_ids
            response.logprobs += new.logprobs
            self._metrics.num_sampled_tokens += len(new.token_ids)
            self._prefilling_again.discard(new.id)
            if new.finish_reason is not None:
                del self._under_way[new.id]
                response.end_segment(self._version, self._name)
                if response.ends(new.finish_reason):
                    closed.append((response, new.finish_reason))
                    finished.append((response.future, response.finished(new.finish_reason)))
                else:
                    closed.append((response, None))
                    self._submit(response)
        self._metrics.num_responses += len(finished)
        self._tell(closed)
        if finished:
            self._resolve(finished)

    def _tell(self, closed: Sequence[tuple[ActiveRequest, str | None]]) -> None:
        """Have those who want to hear of closed segments hear of them, with the finish reasons of the last ones."""
        heard = [(r.on_closed, r.partial(reason)) for r, reason in closed if r.on_closed is not None]
        if heard:
            self._loop.call_soon_threadsafe(_call_all, heard)

    def _resolve(self, results: Sequence[tuple[asyncio.Future[Any], Any]]) -> None:
        self._loop.call_soon_threadsafe(_set_results, results)


def _call_all(heard: Sequence[tuple[Callable[[PartialResponse], None], PartialResponse]]) -> None:
    for hear, partial in heard:
        hear(partial)


def _set_results(results: Sequence[tuple[asyncio.Future[Any], Any]]) -> None:
    for future, result in results:
        if not future.done():
            future.set_result(result)
