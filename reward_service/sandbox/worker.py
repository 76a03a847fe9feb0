"""Runs work on untrusted text in child processes, which are killed at a deadline.

A child runs `worker_child.py` and exchanges one line of JSON each way. It has the privileges of the service: code of a
response runs in `sandbox` instead. The kernel ends a child that uses up its CPU time on a question: then the text is
the cause. If a question takes WALL_SHARE times as long, the machine is.
"""

from __future__ import annotations

import contextlib
import json
import queue
import selectors
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from cluster.errors import RewardError

CHILD = Path(__file__).with_name("worker_child.py")
START_TIMEOUT_S = 60.0
GRACE_S = 5.0
WALL_SHARE = 3.0
MAX_ANSWER_BYTES = 1 << 16


class OutOfCpuTime(Exception):
    """A question took all the CPU time that it may take."""


class Worker:
    """One child process for one `task`, started at the first question and restarted after it was killed.

    A question may take `cpu_s` of CPU time.
    """

    def __init__(self, task: str, setup: Any, *, cpu_s: float) -> None:
        self._timeout_s = WALL_SHARE * cpu_s
        self._arguments = [sys.executable, "-I", str(CHILD), task, str(cpu_s), str(self._timeout_s + GRACE_S)]
        self._setup = setup
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, question: Any) -> Any:
        """Return the child's answer.

        Raises OutOfCpuTime, TimeoutError if the machine is too busy, and RewardError if the child ends or fails.

        After an error the child is killed, and the next question starts a new one.
        """
        try:
            if self._process is None:
                self._process = subprocess.Popen(
                    self._arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env={}
                )
                self._exchange(self._setup, START_TIMEOUT_S)
            return self._exchange(question, self._timeout_s)
        except (OutOfCpuTime, TimeoutError, RewardError):
            self.close()
            raise

    def close(self) -> None:
        """Kill the child."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()  # type: ignore[union-attr]

    def _exchange(self, message: Any, timeout_s: float) -> Any:
        process = self._process
        assert process is not None
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(message).encode() + b"\n")
            process.stdin.flush()
        except BrokenPipeError:
            raise RewardError("worker", "its process ended") from None
        answer = json.loads(_read_line(process, time.monotonic() + timeout_s))
        if "error" in answer:
            raise RewardError("worker", answer["error"])
        return answer["answer"]


def _read_line(process: subprocess.Popen[bytes], deadline: float) -> bytes:
    assert process.stdout is not None
    line = b""
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while not line.endswith(b"\n"):
            if not selector.select(max(0.0, deadline - time.monotonic())):
                raise TimeoutError
            read = process.stdout.read1(MAX_ANSWER_BYTES)  # type: ignore[attr-defined]
            line += read
            if not read and process.wait() == -signal.SIGPROF:
                raise OutOfCpuTime
            if not read:
                raise RewardError("worker", f"its process ended (exit code {process.wait()})")
            if len(line) > MAX_ANSWER_BYTES:
                raise RewardError("worker", f"its answer is longer than {MAX_ANSWER_BYTES} bytes")
    return line


class Workers:
    """A pool of workers for one task; each call takes a free worker, or waits for one."""

    def __init__(self, task: str, setup: Any, *, cpu_s: float, num: int = 1) -> None:
        self._all = [Worker(task, setup, cpu_s=cpu_s) for _ in range(num)]
        self._free: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        for worker in self._all:
            self._free.put(worker)

    def ask(self, question: Any) -> Any:
        """As `Worker.ask`."""
        worker = self._free.get()
        try:
            return worker.ask(question)
        finally:
            self._free.put(worker)

    def close(self) -> None:
        """Kill every child."""
        for worker in self._all:
            worker.close()
