"""Start Ray actors and tasks and call them as plain async objects; the only file that calls `.remote`.

Actors are plain classes with async methods. A call through `RemoteActor` is awaited the same way. It raises the error
that the method raised, ActorDied with the actor's name if its process died, or InputError if its constructor raised.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, RayActorError, RayTaskError, WorkerCrashedError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.errors import ActorDied, DeadlineExceeded, InputError, first_line, last_line

NAMESPACE = "antiphon"


class RemoteActor:
    """Async proxy of one Ray actor: ``await actor.method(...)``. Can be pickled."""

    def __init__(self, name: str, handle: Any) -> None:
        self.name = name
        self.handle = handle

    def __getattr__(self, method: str) -> Callable[..., Awaitable[Any]]:
        if method.startswith("_"):
            raise AttributeError(method)

        def call(*args: Any, **kwargs: Any) -> Awaitable[Any]:
            return _await(self.name, getattr(self.handle, method).remote(*args, **kwargs))

        return call

    def __reduce__(self) -> tuple[Any, ...]:
        return (RemoteActor, (self.name, self.handle))


async def _await(name: str, reference: Any) -> Any:
    try:
        return await reference
    except RayTaskError as error:
        raise _cause(error) from None
    except (RayActorError, ActorUnavailableError, WorkerCrashedError) as error:
        if getattr(error, "actor_init_failed", False):
            raise InputError(name, f"it cannot be constructed: {last_line(error)}") from error
        raise ActorDied(name, first_line(error)) from error


def _cause(error: RayTaskError) -> BaseException:
    """Return the error that was raised in the actor, with the remote traceback as a note."""
    cause: BaseException | None = error.cause
    if cause is None:
        return RuntimeError(str(error))
    cause.add_note(str(error))
    return cause


def start_actor(
    cls: type,
    *args: Any,
    name: str,
    registered_as: str | None = None,
    log_path: Path | None = None,
    num_cpus: float = 0,
    num_gpus: float = 0,
    env: Mapping[str, str] | None = None,
    pinned_and_restarted: bool = False,
    **kwargs: Any,
) -> RemoteActor:
    """Start `cls(*args, **kwargs)` in a separate process; returns at once, while the constructor may still run.

    `find_actor` finds it by `registered_as`; its process prints to `log_path`; `pinned_and_restarted` pins it to this
    node and lets Ray restart it if its process dies.
    """
    options: dict[str, Any] = {"num_cpus": num_cpus, "num_gpus": num_gpus, "max_restarts": 0}
    if registered_as:
        options |= {"name": registered_as, "namespace": NAMESPACE}
    if pinned_and_restarted:
        node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        options |= {"max_restarts": -1, "max_task_retries": -1, "scheduling_strategy": node}
    if env:
        options["runtime_env"] = {"env_vars": dict(env)}
    handle = ray.remote(_logged(cls, log_path)).options(**options).remote(*args, **kwargs)
    return RemoteActor(name, handle)


def _logged(cls: type, log_path: Path | None) -> type:
    if log_path is None:
        return cls
    path = log_path

    class Logged(cls):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            redirect_output(path)
            super().__init__(*args, **kwargs)

    Logged.__name__ = Logged.__qualname__ = cls.__name__
    return Logged


def redirect_output(path: Path) -> None:
    """Send this process's stdout and stderr, C libraries included, to the end of `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


def find_actor(registered_as: str) -> RemoteActor:
    """Return the actor registered under a name. Raises InputError if there is none (its run has ended)."""
    try:
        return RemoteActor(registered_as, ray.get_actor(registered_as, namespace=NAMESPACE))
    except ValueError as error:
        raise InputError(registered_as, "no such actor on this Ray: its run is not running") from error


def kill_actor(actor: RemoteActor) -> None:
    """Kill an actor's process; no-op if it has died, or if this process is not connected to Ray."""
    if ray.is_initialized():
        ray.kill(actor.handle, no_restart=True)


async def process_of(actor: RemoteActor) -> tuple[str, int]:
    """Return the node id and the process id of an actor."""
    place: tuple[str, int] = await _await(actor.name, actor.handle.__ray_call__.remote(_own_process))
    return place


def _own_process(instance: Any) -> tuple[str, int]:
    return ray.get_runtime_context().get_node_id(), os.getpid()


async def within(awaitable: Awaitable[Any], timeout_s: float, *, where: str, waited_for: str) -> Any:
    """Await with a deadline. Raises DeadlineExceeded naming what was waited for."""
    try:
        return await asyncio.wait_for(awaitable, timeout_s)
    except TimeoutError as error:
        raise DeadlineExceeded(where, f"waited {timeout_s:g} s for {waited_for}") from error


async def call_handle(handle: Any, method: str, *args: Any, name: str, **kwargs: Any) -> Any:
    """Call a method of a Ray Serve deployment handle and await its answer; cancellation cancels the call."""
    response = getattr(handle, method).remote(*args, **kwargs)
    try:
        return await _await(name, response)
    except asyncio.CancelledError:
        response.cancel()
        raise


async def stream_task(
    function: Callable[..., Iterator[Any]],
    *args: Any,
    name: str,
    log_path: Path | None = None,
    num_cpus: float = 0,
    num_gpus: float = 0,
    env: Mapping[str, str] | None = None,
    **kwargs: Any,
) -> AsyncIterator[Any]:
    """Run a generator function in a separate process and yield its items as they arrive."""

    def run(*args: Any, **kwargs: Any) -> Iterator[Any]:
        if log_path is not None:
            redirect_output(log_path)
        yield from function(*args, **kwargs)

    options: dict[str, Any] = {"num_cpus": num_cpus, "num_gpus": num_gpus, "max_retries": 0}
    if env:
        options["runtime_env"] = {"env_vars": dict(env)}
    references = ray.remote(max_calls=1)(run).options(**options, num_returns="streaming").remote(*args, **kwargs)
    async for reference in references:
        yield await _await(name, reference)
