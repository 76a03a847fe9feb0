"""Runs untrusted code in a sandbox, and checks that this machine can enforce its limits.

If a step of setting up the sandbox fails, nothing is run.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.errors import InputError, RewardError

CHILD = Path(__file__).with_name("sandbox_child.py")
START_S = 10.0
MAX_REPORT_BYTES = 1 << 20


@dataclass(frozen=True)
class Limits:
    """What a program may use. `cpu_s` is CPU time and `wall_s` wall-clock time, in seconds."""

    cpu_s: int
    wall_s: float
    memory_mb: int
    max_threads: int
    scratch_mb: int


@dataclass(frozen=True)
class Report:
    """Which tests passed, the indices of tests that are not Python, and how the process ended.

    `ended` is the exit code, minus a signal's number, or `late`. `slowdown` is how many times longer work took than on
    a free CPU, measured after the program's CPU time had passed by the clock; 1 if it ended before. `num_preempted` is
    how often a late program was taken from the CPU.
    """

    passed: tuple[bool, ...]
    broken: tuple[int, ...]
    ended: str
    slowdown: float = 1.0
    num_preempted: int = 0


def run_confined(program: str, tests: Sequence[str], limits: Limits) -> Report:
    """Run the program, then each test. Raises RewardError if the sandbox could not be set up."""
    job = {
        "program": program,
        "tests": list(tests),
        "limits": {
            "cpu_s": limits.cpu_s,
            "wall_s": limits.wall_s,
            "memory_bytes": limits.memory_mb << 20,
            "max_threads": limits.max_threads,
            "scratch_bytes": limits.scratch_mb << 20,
        },
    }
    report = _child_report(json.dumps(job).encode(), limits.wall_s + START_S)
    if "unconfined" in report:
        raise RewardError("sandbox", report["unconfined"])
    return Report(
        tuple(report["passed"]), tuple(report["broken"]), report["ended"], report["slowdown"], report["num_preempted"]
    )


def _child_report(job: bytes, timeout_s: float) -> Any:
    """Return the child's report; all processes of its session are killed, even after an error."""
    # hash seed 0 fixes the order of sets, so that the same code always has the same result
    process = subprocess.Popen(
        [sys.executable, "-P", "-s", "-S", str(CHILD)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={"PYTHONHASHSEED": "0"},
        cwd="/",
        start_new_session=True,
    )
    try:
        out, _ = process.communicate(job, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        raise RewardError("sandbox", f"no report within {timeout_s:g} s") from None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    if not out or len(out) > MAX_REPORT_BYTES:
        raise RewardError("sandbox", f"its process ended without a report (exit code {process.returncode})")
    return json.loads(out)


PROBES = {
    "code can write and read in its folder": "open('x', 'w').write('y'); assert open('x').read() == 'y'",
    "there is no network": """
import socket
for family in (socket.AF_INET, socket.AF_INET6):
    try: socket.socket(family)
    except OSError: continue
    raise AssertionError""",
    "/etc/passwd is unreachable": """
import os
assert not os.path.exists('/etc/passwd') and not os.path.exists('/proc') and not os.path.exists('/dev')""",
    "the home folder is unreachable": """
import os
names = os.listdir({home!r}) if os.path.exists({home!r}) else []
assert all(os.__file__.startswith(os.path.join({home!r}, name) + '/') for name in names)""",
    "files outside its folder can't be written": """
for path in ('/x', os.__file__, os.path.dirname(os.__file__) + '/x'):
    try: open(path, 'a')
    except OSError: continue
    raise AssertionError""",
    "code can't start processes": """
import os
for start in (os.fork, lambda: os.execv({python!r}, ['python']), lambda: os.posix_spawn({python!r}, ['python'], {{}})):
    try: start()
    except OSError: continue
    raise AssertionError""",
    "threads are limited": """
import threading
stop = threading.Event()
started = 0
try:
    for started in range({max_threads} + 3): threading.Thread(target=stop.wait, daemon=True).start()
except RuntimeError: pass
finally: stop.set()
assert started < {max_threads} + 3 - 1""",
    "memory is limited": """
try: bytearray({memory_mb} << 20)
except MemoryError: pass
else: raise AssertionError""",
    "the size of its folder is limited": """
piece = bytes(1 << 16)
try:
    for name in range(4):
        with open(f'big{{name}}', 'wb', 0) as file:
            for written in range(0, ({scratch_mb} << 20) // 2, len(piece)): file.write(piece)
except OSError: pass
else: raise AssertionError""",
}


def check_confinement(limits: Limits, where: str) -> None:
    """Raise InputError if this machine can't enforce a limit of the sandbox; each limit is really tried."""
    values = {
        "home": os.path.expanduser("~"),
        "python": sys.executable,
        "max_threads": limits.max_threads,
        "memory_mb": limits.memory_mb,
        "scratch_mb": limits.scratch_mb,
    }
    tests = [source.format(**values) for source in PROBES.values()]
    try:
        report = run_confined("import os", tests, limits)
    except RewardError as error:
        raise InputError(where, f"this machine can't run code in a sandbox: {error.what}") from error
    failed = [probe for probe, passed in zip(PROBES, report.passed, strict=True) if not passed]
    if failed:
        what = f"this machine can't run code in a sandbox: it does not ensure that {'; '.join(failed)} ({report.ended})"
        raise InputError(where, what)
