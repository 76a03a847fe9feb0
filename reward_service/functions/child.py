"""Main program of a function's process: loads one user function and scores requests with it, in the main thread.

Speaks with `process` over an inherited socket: requests come as Python objects from the parent, answers go as JSON, so
that nothing which the function makes is unpickled by the parent. Ends if the parent ends.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import sys
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from cluster import user_code
from cluster.errors import InputError
from cluster.files import digest_files
from reward_service.functions.caller import FunctionCaller
from reward_service.functions.results import Result, SignatureMismatch

PARENT_CHECK_S = 1.0


def main() -> None:
    """Answer the parent until it closes the connection."""
    connection = Connection(int(sys.argv[1]))
    os.set_inheritable(connection.fileno(), False)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    try:
        setup = connection.recv()
        caller = _load(connection, setup)
        if caller is None:
            return
        if caller.is_async:
            asyncio.run(_serve_async(connection, caller, setup["timeout_s"]))
        else:
            _serve(connection, caller)
    except (EOFError, ConnectionError):  # the parent has closed the connection
        return


def _end_with(parent: int) -> None:
    """End this process, in the middle of a call too, if the parent has ended."""
    while os.getppid() == parent:
        time.sleep(PARENT_CHECK_S)
    os._exit(1)


def _load(connection: Connection, setup: dict[str, Any]) -> FunctionCaller | None:
    """Load the function and describe it to the parent, or tell why it can't be called and return None."""
    for folder in setup["folders"]:
        user_code.search_in(Path(folder))
    try:
        function = user_code.load(setup["path"], setup["key"])
        caller = FunctionCaller(function)
    except InputError as error:
        _send(connection, {"refused": [error.where, error.what]})
        return None
    except SignatureMismatch as error:
        _send(connection, {"refused": [user_code.place_of(function), f"{setup['path']} {error}"]})
        return None
    source = user_code.source_file(function)
    digest = digest_files([Path(source)]) if source else "builtin"
    _send(connection, {"kind": caller.kind, "digest": digest, "place": caller.place, "is_async": caller.is_async})
    return caller


def _serve(connection: Connection, caller: FunctionCaller) -> None:
    while True:
        number, requests = connection.recv()
        _answer(connection, number, caller.results(requests))


async def _serve_async(connection: Connection, caller: FunctionCaller, timeout_s: float) -> None:
    """Answer calls concurrently; a thread receives them."""
    loop, calls, tasks = asyncio.get_running_loop(), asyncio.Queue[Any](), set[asyncio.Task[None]]()

    async def run(number: int, requests: Any) -> None:
        _answer(connection, number, await caller.results_async(requests, timeout_s=timeout_s))

    threading.Thread(target=_receive, args=(connection, loop, calls), daemon=True).start()
    while (call := await calls.get()) is not None:
        task = asyncio.create_task(run(*call))
        tasks.add(task)
        task.add_done_callback(tasks.discard)


def _receive(connection: Connection, loop: asyncio.AbstractEventLoop, calls: asyncio.Queue[Any]) -> None:
    call: Any = ()
    while call is not None:
        try:
            call = connection.recv()
        except (EOFError, ConnectionError):
            call = None
        loop.call_soon_threadsafe(calls.put_nowait, call)


def _answer(connection: Connection, number: int, results: list[Result]) -> None:
    _send(connection, {"number": number, "results": [dataclasses.asdict(result) for result in results]})


def _send(connection: Connection, message: Any) -> None:
    connection.send_bytes(json.dumps(message).encode(errors="backslashreplace"))
