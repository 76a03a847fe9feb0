"""Runs in a process of its own and imports nothing of ours: confines itself, then runs a program and its tests.

Four processes. The first makes namespaces of its own for users, mounts, network, processes and System V objects; a
helper, still outside, maps its users; it builds a root of nothing but Python's standard library (read-only, installed
packages hidden) and a scratch folder in memory, and makes that its whole file system. Its child is the namespace's
init, which keeps the deadline and reports: when it ends the kernel kills all that is left inside. Init's child gives
up every right, bounds what it may use, is refused system calls by a seccomp filter (other processes and programs,
sockets but Unix ones, mounts, memory that no limit counts), and runs the program.

Reads {"program", "tests", "limits"} as JSON and writes one line: {"passed", "broken", "ended"} or {"unconfined": why}.
A test counts as passed where its line carries a number that nobody was told, so ending early or printing passes none.
A program that searches the interpreter's own frames for that number is not defended against.
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
REFUSED = {  # name: number on x86_64, on aarch64; None where it does not exist
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
    """A step of the confinement failed; nothing was run."""


def call(what: str, result: int) -> None:
    """Raise Unconfined, naming the step, for a system call that failed."""
    if result != 0:
        raise Unconfined(f"{what}: {os.strerror(ctypes.get_errno())}")


def enter_namespaces() -> bool:
    """Leave the machine's namespaces. Returns whether nobody is mapped beside our user, for which we must be root."""
    privileged = os.geteuid() == 0
    ready, go = os.pipe()
    parent = os.getpid()
    helper = os.fork()
    if helper == 0:
        os.close(go)
        os._exit(map_users(parent, privileged) if os.read(ready, 1) else 1)
    call("new namespaces (unshare)", libc.unshare(NEW_NAMESPACES))
    os.write(go, b"!")
    os.close(go)
    os.close(ready)
    if os.waitpid(helper, 0)[1] != 0:
        raise Unconfined("users of the namespace: not permitted to map them")
    return privileged


def map_users(pid: int, privileged: bool) -> int:
    """Map us to root inside and, where we may, nobody to 1: root's processes can't be limited in number."""
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
    """Mount, or raise Unconfined."""
    given = [text.encode() if text is not None else None for text in (source, target, kind, options)]
    call(f"mount on {target}", libc.mount(given[0], given[1], given[2], ctypes.c_ulong(flags), given[3]))


def build_root(scratch_bytes: int) -> None:
    """Make a root of the standard library and /tmp, and nothing else, this process's file system."""
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
    call("pivot_root", libc.pivot_root(b".", b"."))
    call("leaving the machine's files", libc.umount2(b".", MNT_DETACH))
    os.chdir("/tmp")
    mount("none", "/", None, MS_BIND | MS_REMOUNT | MS_RDONLY | safe | MS_NOEXEC)


def limit(limits: dict[str, int]) -> None:
    """Bound what this process may use."""
    bounds = {
        resource.RLIMIT_CPU: limits["cpu_s"],
        resource.RLIMIT_AS: limits["memory_bytes"],
        resource.RLIMIT_NPROC: limits["max_threads"] + 2,  # where the user is ours, the first two processes count
        resource.RLIMIT_FSIZE: limits["scratch_bytes"],
        resource.RLIMIT_NOFILE: MAX_FILES,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
    }
    for kind, bound in bounds.items():
        resource.setrlimit(kind, (bound, bound))


def give_up_rights(privileged: bool) -> None:
    """Become nobody, where nobody is mapped, without capabilities, for good."""
    if privileged:
        os.setgroups([])
        os.setresgid(1, 1, 1)
        os.setresuid(1, 1, 1)
    header = struct.pack("Ii", CAPABILITY_VERSION_3, 0)
    call("giving up capabilities", libc.capset(header, bytes(24)))
    call("no new privileges", libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))


def filter_calls() -> None:
    """Refuse the system calls that neither namespaces nor limits make harmless."""
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
    call("system call filter", libc.prctl(PR_SET_SECCOMP, SECCOMP_FILTER, filtering, 0, 0))


def run_tests(job: dict[str, Any], number: str, report: int) -> None:
    """Run the program, then each test on what it defined, and write a line for each that passed."""

    def say(place: int, what: str) -> None:
        os.write(report, f"{number} {place} {what}\n".encode())

    tests = []
    for place, source in enumerate(job["tests"]):
        try:
            tests.append(compile(source, f"<test {place}>", "exec"))
        except (SyntaxError, ValueError, MemoryError, RecursionError):
            return say(place, "broken")
    module = types.ModuleType("response")
    sys.modules["response"] = module
    with contextlib.suppress(BaseException):
        exec(compile(job["program"], "<response>", "exec"), module.__dict__)
        for place, test in enumerate(tests):
            with contextlib.suppress(BaseException):
                exec(test, dict(module.__dict__))
                say(place, "passed")
    return None


def be_tested(job: dict[str, Any], number: str, report: int, privileged: bool) -> None:
    """What the innermost process does; does not return."""
    try:
        os.environ.clear()
        os.closerange(report + 1, MAX_FILES * 16)
        limit(job["limits"])
        give_up_rights(privileged)
        filter_calls()
    except (Unconfined, OSError, ValueError) as error:
        os.write(report, f"{number} -1 {error}\n".encode())
        os._exit(1)
    run_tests(job, number, report)
    os._exit(0)


def be_init(job: dict[str, Any], privileged: bool) -> dict[str, Any]:
    """Start the innermost process and listen to it until it ends or its time is over."""
    libc.prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0)
    deadline = time.monotonic() + job["limits"]["wall_s"]
    number = secrets.token_hex(16)
    heard, report = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.dup2(report, 3)
        be_tested(job, number, 3, privileged)
    os.close(report)
    said = listen(heard, deadline)
    ended = wait(pid, deadline)
    lines = [line.split(" ", 2) for line in said.decode(errors="replace").splitlines()]
    told = [(int(line[1]), line[2]) for line in lines if len(line) == 3 and line[0] == number]
    if told and told[0][0] < 0:
        return {"unconfined": told[0][1]}
    passed = {place for place, what in told if what == "passed"}
    return {
        "passed": [place in passed for place in range(len(job["tests"]))],
        "broken": [place for place, what in told if what == "broken"],
        "ended": ended,
    }


def listen(heard: int, deadline: float) -> bytes:
    """What is written until the other end is closed, the deadline passes, or there is too much of it."""
    said = b""
    while len(said) < 1 << 20 and select.select([heard], [], [], max(0.0, deadline - time.monotonic()))[0]:
        read = os.read(heard, 1 << 16)
        if not read:
            break
        said += read
    return said


def wait(pid: int, deadline: float) -> str:
    """How the process ended: its exit code, minus a signal, or that it was too late."""
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return str(os.waitstatus_to_exitcode(status))
        if time.monotonic() > deadline:
            return "late"
        time.sleep(0.002)


def confine(job: dict[str, Any]) -> dict[str, Any] | None:
    """Confine this process and run the job in it. Returns the report in the namespace's init, None outside of it."""
    for name in PRELOADED:  # they need libraries of the system, which are out of reach afterwards
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    privileged = enter_namespaces()
    build_root(job["limits"]["scratch_bytes"])
    pid = os.fork()
    if pid == 0:
        return be_init(job, privileged)
    os.waitpid(pid, 0)
    return None


def main() -> None:
    """Read the job, hide the streams from it, and write its report."""
    job = json.load(sys.stdin)
    out = os.dup(1)
    os.set_inheritable(out, False)
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    try:
        report = confine(job)
    except (Unconfined, OSError) as error:
        report = {"unconfined": str(error)}
    if report is not None:
        os.write(out, json.dumps(report).encode() + b"\n")
    os._exit(0)


if __name__ == "__main__":
    main()
