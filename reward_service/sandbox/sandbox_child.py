"""Script of a sandbox process: isolates itself, then runs a program and its tests.

Imports only the standard library.

Four processes take part:

1. the first enters new namespaces for users, mounts, network, processes and System V objects, and replaces its file
   system by Python's standard library (read-only, installed packages hidden) and a scratch folder in memory;
2. a helper outside the namespaces maps the users of the first;
3. the first's child is the init of the process namespace: it enforces the deadline and reports. When it ends, the
   kernel kills every process inside;
4. init's child gives up all privileges, sets its resource limits, installs a seccomp filter (no other processes or
   programs, no sockets but Unix ones, no mounts, no memory outside the limits), and runs the program.

Reads {"program", "tests", "limits"} as JSON and writes one line: {"passed", "broken", "ended", "slowdown",
"num_preempted"} or {"unconfined": why}.
A test counts as passed only if its line carries a secret number, so that exiting early or printing passes none. This
does not defend against a program that searches the interpreter's frames for that number.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import platform
import resource
import secrets
import select
import struct
import sys
import sysconfig
import time
import types
from pathlib import Path
from typing import Any

NEW_NAMESPACES = 0x10000000 | 0x20000 | 0x40000000 | 0x20000000 | 0x8000000 | 0x4000000  # user mnt net pid ipc uts
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 32, 4096, 16384, 1 << 18
MNT_DETACH = 2
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, SECCOMP_FILTER, SIGKILL = 1, 22, 38, 2, 9
CAPABILITY_VERSION_3 = 0x20080522
PIVOT_ROOT_ON = "/proc"
NOBODY = 65534
PRELOADED = ("zlib", "bz2", "lzma", "hashlib", "decimal")
MAX_FILES = 64
MAX_INODES = 1024

# fmt: off
REFUSED = {  # name: number on x86_64, on aarch64; None if it does not exist
    "fork": (57, None), "vfork": (58, None), "execve": (59, 221), "execveat": (322, 281), "unshare": (272, 97),
    "setns": (308, 268), "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51),
    "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430), "fsconfig": (431, 431),
    "fsmount": (432, 432), "fspick": (433, 433), "mount_setattr": (442, 442), "ptrace": (101, 117),
    "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272), "pidfd_getfd": (438, 438),
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282), "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426), "io_uring_register": (427, 427), "add_key": (248, 217), "request_key": (249, 218),
    "keyctl": (250, 219), "memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194),
    "msgget": (68, 186), "semget": (64, 190), "mq_open": (240, 180), "kexec_load": (246, 104),
    "kexec_file_load": (320, 294), "init_module": (175, 105), "finit_module": (313, 273), "delete_module": (176, 106),
    "reboot": (169, 142), "swapon": (167, 224), "swapoff": (168, 225), "quotactl": (179, 60), "acct": (163, 89),
    "settimeofday": (164, 170), "clock_settime": (227, 112), "personality": (135, 92), "syslog": (103, 116),
    "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265), "fanotify_init": (300, 262),
}
# fmt: on
MACHINES = {"x86_64": (0, 0xC000003E, 56, (41, 53)), "aarch64": (1, 0xC00000B7, 220, (198, 199))}
CLONE3, X32_CALLS, CLONE_THREAD, AF_UNIX = 435, 0x40000000, 0x00010000, 1
LOAD, EQUALS, AT_LEAST, HAS_BITS, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
ALLOW, KILL, REFUSE, UNKNOWN = 0x7FFF0000, 0x80000000, 0x00050001, 0x00050026  # the last two: EPERM, ENOSYS

libc = ctypes.CDLL(None, use_errno=True)


class Unconfined(Exception):
    """A step of setting up the sandbox failed; nothing was run."""


def check(step: str, result: int) -> None:
    """Raise Unconfined that names the step if a system call failed."""
    if result != 0:
        raise Unconfined(f"{step}: {os.strerror(ctypes.get_errno())}")


def enter_namespaces() -> bool:
    """Enter new namespaces. Returns whether the user `nobody` could be mapped too, which requires root."""
    privileged = os.geteuid() == 0
    ready, go = os.pipe()
    parent = os.getpid()
    helper = os.fork()
    if helper == 0:
        os.close(go)
        os._exit(map_users(parent, privileged) if os.read(ready, 1) else 1)
    check("new namespaces (unshare)", libc.unshare(NEW_NAMESPACES))
    os.write(go, b"!")
    os.close(go)
    os.close(ready)
    if os.waitpid(helper, 0)[1] != 0:
        raise Unconfined("mapping users of the namespace: not permitted")
    return privileged


def map_users(pid: int, privileged: bool) -> int:
    """Map this user to root and, if permitted, `nobody` to 1: root's processes can't be limited."""
    try:
        for kind, own in (("uid", os.geteuid()), ("gid", os.getegid())):
            if kind == "gid" and not privileged:
                Path(f"/proc/{pid}/setgroups").write_text("deny")
            more = f"1 {NOBODY} 1\n" if privileged else ""
            Path(f"/proc/{pid}/{kind}_map").write_text(f"0 {own} 1\n{more}")
    except OSError:
        return 1
    return 0


def mount(source: str, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    """Mount a file system. Raises Unconfined."""
    encoded = [text.encode() if text is not None else None for text in (source, target, kind, options)]
    check(f"mount on {target}", libc.mount(encoded[0], encoded[1], encoded[2], ctypes.c_ulong(flags), encoded[3]))


def build_root(scratch_bytes: int) -> None:
    """Replace this process's file system by a root with only the standard library and /tmp."""
    root, safe = PIVOT_ROOT_ON, MS_NOSUID | MS_NODEV
    os.umask(0o022)
    folders = sorted({sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")})
    mount("none", "/", None, MS_REC | MS_PRIVATE)
    mount("root", root, "tmpfs", safe | MS_NOEXEC, "size=64k,nr_inodes=256,mode=755")
    for folder in folders:
        os.makedirs(root + folder)
        mount(folder, root + folder, None, MS_BIND)
        mount("none", root + folder, None, MS_BIND | MS_REMOUNT | MS_RDONLY | safe)
        for installed in ("site-packages", "dist-packages"):
            if os.path.isdir(f"{root}{folder}/{installed}"):
                mount("none", f"{root}{folder}/{installed}", "tmpfs", MS_RDONLY | safe | MS_NOEXEC, "size=4k")
    os.mkdir(f"{root}/tmp")
    mount("scratch", f"{root}/tmp", "tmpfs", safe | MS_NOEXEC, f"size={scratch_bytes},nr_inodes={MAX_INODES},mode=777")
    os.chdir(root)
    check("pivot_root", libc.pivot_root(b".", b"."))
    check("unmounting the old root", libc.umount2(b".", MNT_DETACH))
    os.chdir("/tmp")
    mount("none", "/", None, MS_BIND | MS_REMOUNT | MS_RDONLY | safe | MS_NOEXEC)


def limit(limits: dict[str, int]) -> None:
    """Set the resource limits of this process."""
    bounds = {
        resource.RLIMIT_CPU: limits["cpu_s"],
        resource.RLIMIT_AS: limits["memory_bytes"],
        resource.RLIMIT_NPROC: limits["max_threads"] + 2,  # without root, the first two processes count as well
        resource.RLIMIT_FSIZE: limits["scratch_bytes"],
        resource.RLIMIT_NOFILE: MAX_FILES,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
    }
    for kind, bound in bounds.items():
        resource.setrlimit(kind, (bound, bound))


def drop_privileges(privileged: bool) -> None:
    """Become `nobody`, if it is mapped, and drop all capabilities permanently."""
    if privileged:
        os.setgroups([])
        os.setresgid(1, 1, 1)
        os.setresuid(1, 1, 1)
    header = struct.pack("Ii", CAPABILITY_VERSION_3, 0)
    check("dropping capabilities", libc.capset(header, bytes(24)))
    check("no new privileges", libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))


def filter_calls() -> None:
    """Install a filter that refuses the system calls which neither namespaces nor limits make harmless."""
    if platform.machine() not in MACHINES:
        raise Unconfined(f"system calls: no filter for {platform.machine()}")
    column, architecture, clone, sockets = MACHINES[platform.machine()]
    program = [(LOAD, 0, 0, 4), (EQUALS, 1, 0, architecture), (RETURN, 0, 0, KILL)]
    program += [(LOAD, 0, 0, 0), (AT_LEAST, 0, 1, X32_CALLS), (RETURN, 0, 0, REFUSE)]
    for numbers in REFUSED.values():
        number = numbers[column]
        if number is not None:
            program += [(EQUALS, 0, 1, number), (RETURN, 0, 0, REFUSE)]
    program += [(EQUALS, 0, 1, CLONE3), (RETURN, 0, 0, UNKNOWN)]
    program += [(EQUALS, 0, 4, clone), (LOAD, 0, 0, 16), (HAS_BITS, 1, 0, CLONE_THREAD), (RETURN, 0, 0, REFUSE)]
    program += [(RETURN, 0, 0, ALLOW)]
    for number in sockets:
        program += [(EQUALS, 0, 4, number), (LOAD, 0, 0, 16), (EQUALS, 1, 0, AF_UNIX), (RETURN, 0, 0, REFUSE)]
        program += [(RETURN, 0, 0, ALLOW)]
    program += [(RETURN, 0, 0, ALLOW)]
    code = b"".join(struct.pack("HBBI", *instruction) for instruction in program)
    memory = ctypes.create_string_buffer(code)
    filtering = struct.pack("HP", len(program), ctypes.addressof(memory))
    check("system call filter", libc.prctl(PR_SET_SECCOMP, SECCOMP_FILTER, filtering, 0, 0))


def run_tests(job: dict[str, Any], number: str, report: int) -> None:
    """Run the program, then each test in a copy of its namespace; write a line for each test that passed."""

    def write_line(index: int, result: str) -> None:
        os.write(report, f"{number} {index} {result}\n".encode())

    tests = []
    for index, source in enumerate(job["tests"]):
        try:
            tests.append(compile(source, f"<test {index}>", "exec"))
        except (SyntaxError, ValueError, MemoryError, RecursionError):
            return write_line(index, "broken")
    module = types.ModuleType("response")
    sys.modules["response"] = module
    with contextlib.suppress(BaseException):
        exec(compile(job["program"], "<response>", "exec"), module.__dict__)
        for index, test in enumerate(tests):
            with contextlib.suppress(BaseException):
                exec(test, dict(module.__dict__))
                write_line(index, "passed")
    return None


def run_innermost(job: dict[str, Any], number: str, report: int, privileged: bool) -> None:
    """Body of the innermost process: drop privileges, run the tests and exit."""
    try:
        os.environ.clear()
        os.closerange(report + 1, MAX_FILES * 16)
        limit(job["limits"])
        drop_privileges(privileged)
        filter_calls()
    except (Unconfined, OSError, ValueError) as error:
        os.write(report, f"{number} -1 {error}\n".encode())
        os._exit(1)
    run_tests(job, number, report)
    os._exit(0)


def run_init(job: dict[str, Any], privileged: bool) -> dict[str, Any]:
    """Body of init: start the innermost process and read its lines until it ends or its time is over."""
    libc.prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0)
    started = time.monotonic()
    deadline = started + job["limits"]["wall_s"]
    load = Load(started + min(job["limits"]["cpu_s"], job["limits"]["wall_s"] / 2))
    number = secrets.token_hex(16)
    lines_in, report = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.dup2(report, 3)
        run_innermost(job, number, 3, privileged)
    os.close(report)
    output = read_all(lines_in, deadline, load)
    ended = wait(pid, deadline, load)
    lines = [line.split(" ", 2) for line in output.decode(errors="replace").splitlines()]
    results = [(int(line[1]), line[2]) for line in lines if len(line) == 3 and line[0] == number]
    if results and results[0][0] < 0:
        return {"unconfined": results[0][1]}
    passed = {index for index, result in results if result == "passed"}
    return {
        "passed": [index in passed for index in range(len(job["tests"]))],
        "broken": [index for index, result in results if result == "broken"],
        "ended": ended,
        "slowdown": load.slowdown(),
        "num_preempted": load.num_preempted,
    }


class Load:
    """How much longer work takes on this machine than on a free CPU, by bursts of work from `start` on."""

    EVERY_S, BURST_S = 0.25, 0.02

    def __init__(self, start: float) -> None:
        self._next = start
        self._wall_s = self._cpu_s = 0.0
        self.num_preempted = 0
        """How often a late program had to wait for a CPU that it wanted to use."""

    def wait_s(self, deadline: float) -> float:
        """Return how long to wait until the next burst or the deadline."""
        return max(0.0, min(deadline, self._next) - time.monotonic())

    def measure(self) -> None:
        """Work for BURST_S of CPU time, if it is time for it."""
        wall, cpu = time.monotonic(), time.process_time()
        if wall < self._next:
            return
        while time.process_time() < cpu + self.BURST_S:
            pass
        self._wall_s += time.monotonic() - wall
        self._cpu_s += time.process_time() - cpu
        self._next = time.monotonic() + self.EVERY_S

    def slowdown(self) -> float:
        """Return wall-clock time by CPU time; 1 if nothing was measured."""
        return self._wall_s / self._cpu_s if self._cpu_s else 1.0


def read_all(pipe: int, deadline: float, load: Load) -> bytes:
    """Read until the other end is closed, the deadline passes, or 1 MiB was read."""
    output = b""
    while len(output) < 1 << 20 and time.monotonic() < deadline:
        if not select.select([pipe], [], [], load.wait_s(deadline))[0]:
            load.measure()
            continue
        read = os.read(pipe, 1 << 16)
        if not read:
            break
        output += read
    return output


def wait(pid: int, deadline: float, load: Load) -> str:
    """Wait for a process. Returns its exit code (minus a signal's number), or `late` if killed at the deadline."""
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return str(os.waitstatus_to_exitcode(status))
        if time.monotonic() > deadline:
            os.kill(pid, SIGKILL)
            load.num_preempted = os.wait4(pid, 0)[2].ru_nivcsw
            return "late"
        load.measure()
        time.sleep(0.002)


def run_sandboxed(job: dict[str, Any]) -> dict[str, Any] | None:
    """Set up the sandbox and run the job.

    Returns the report in the process that is init, None in the first process.
    """
    for name in PRELOADED:  # they need system libraries, which can't be loaded afterwards
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    privileged = enter_namespaces()
    build_root(job["limits"]["scratch_bytes"])
    pid = os.fork()
    if pid == 0:
        return run_init(job, privileged)
    os.waitpid(pid, 0)
    return None


def main() -> None:
    """Read the job from stdin, detach the standard streams, run the job and write its report."""
    job = json.load(sys.stdin)
    out = os.dup(1)
    os.set_inheritable(out, False)
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    try:
        report = run_sandboxed(job)
    except (Unconfined, OSError) as error:
        report = {"unconfined": str(error)}
    if report is not None:
        os.write(out, json.dumps(report).encode() + b"\n")
    os._exit(0)


if __name__ == "__main__":
    main()
