"""Real attempts to escape from the sandbox, and scoring code by its tests."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import textwrap
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster.errors import InputError, RewardError
from cluster.scoring import Score, ScoreRequest
from reward_service.config.scorers import CodeConfig
from reward_service.config.service import RewardServiceConfig
from reward_service.sandbox import sandbox
from reward_service.sandbox.sandbox import Limits, Report, check_confinement, run_confined
from reward_service.scorers import code_rule as code_rule_module
from reward_service.scorers.code_rule import code_rule
from reward_service.scorers.scorer import close
from tests.support.building import build_scorer

LIMITS = Limits(cpu_s=1, wall_s=30.0, memory_mb=256, max_threads=4, scratch_mb=2)
REFUSES = "import os, socket, ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"


def has_namespaces() -> bool:
    try:
        return run_confined("", ["pass"], LIMITS).passed == (True,)
    except RewardError:
        return False


pytestmark = [
    pytest.mark.skipif(not has_namespaces(), reason="this machine allows no user namespaces"),
    pytest.mark.process,
]


def run(program: str, *tests: str, **limits: Any) -> Report:
    return run_confined(program, tests, Limits(**(LIMITS.__dict__ | limits)))


REFUSALS = "(OSError, MemoryError, RuntimeError, ImportError, AssertionError)"


def escapes(*attempts: str, needs: str = "") -> list[str]:
    """Return the attempts that were not refused, all made in one sandbox; an attempt must not fail otherwise."""
    tests = [
        f"try:\n{textwrap.indent(attempt, '    ')}\nexcept {REFUSALS}: pass\nelse: raise SystemExit"
        for attempt in attempts
    ]
    report = run(REFUSES + needs, *tests)
    assert not report.broken
    return [attempt for attempt, refused in zip(attempts, report.passed, strict=True) if not refused]


def test_report_says_which_tests_pass() -> None:
    report = run("def double(x): return 2 * x", "assert double(2) == 4", "assert double(2) == 5", "double('")
    assert report == Report((False, False, False), (2,), "0")
    report = run("def double(x): return 2 * x", "assert double(2) == 4", "assert double(2) == 5")
    assert report == Report((True, False), (), "0")


def test_this_machine_enforces_every_limit() -> None:
    check_confinement(LIMITS, "here")


def test_network_is_unreachable(tmp_path: Path) -> None:
    with socket.socket() as listening, socket.socket(socket.AF_UNIX) as abstract, socket.socket(socket.AF_UNIX) as file:
        listening.bind(("127.0.0.1", 0))
        abstract.bind("\0antiphon-confined-test")
        file.bind(str(tmp_path / "s"))
        for each in (listening, abstract, file):
            each.listen()
        attempts = [
            f"socket.create_connection(('127.0.0.1', {listening.getsockname()[1]}))",
            "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', 9))",
            "socket.socket(socket.AF_INET6)",
            "socket.socket(socket.AF_VSOCK)",
            "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)",
            "socket.socket(socket.AF_UNIX).connect('\\0antiphon-confined-test')",
            f"socket.socket(socket.AF_UNIX).connect({str(tmp_path / 's')!r})",
        ]
        assert escapes(*attempts) == []


def test_files_outside_its_folder_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    attempts = [
        *(f"open({path!r})" for path in ("/etc/passwd", "/proc/self/environ", "/proc/1/environ", "/dev/null", "/sys")),
        f"open({str(tmp_path / 'secret')!r})",
        f"os.stat({str(tmp_path / 'secret')!r})",
        f"os.chmod({str(tmp_path / 'secret')!r}, 0o777)",
        "os.listdir('/..' * 9 + '/etc')",
        "os.symlink('/etc/passwd', 'link'); open('link')",
        "os.chroot('.'); os.chdir('..' * 9); open('etc/passwd')",
        "os.mkdir('d'); assert libc.chroot(b'd') == 0",
        "import math, site; assert os.listdir(os.path.dirname(os.__file__) + '/site-packages')",
        "import pytest",
        f"open({str(Path(sandbox.__file__))!r})",
    ]
    assert escapes(*attempts) == []


def test_no_open_file_or_environment_variable_is_inherited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANTIPHON_TOKEN", "secret")
    needs = "import fcntl, resource\n"
    attempts = [
        "assert os.environ",
        "assert any(os.read(fd, 1) for fd in (0, 1, 2))",
        "for fd in range(4, 60):\n    try: os.fstat(fd)\n    except OSError: continue\n    break\nelse: raise OSError",
    ]
    assert escapes(*attempts, needs=needs) == []


def test_only_its_small_folder_can_be_written() -> None:
    library = "os.path.dirname(os.__file__)"
    attempts = [
        "open('/x', 'w')",
        f"open({library} + '/os.py', 'a')",
        f"os.chmod({library} + '/os.py', 0)",
        f"os.remove({library} + '/os.py')",
        "os.mknod('dev', 0o20666, os.makedev(1, 3)); open('dev')",
        "open('big', 'wb').write(bytes(3 << 20))",
        "for n in range(9): open(f'n{n}', 'wb').write(bytes(1 << 19))",
        "for n in range(5000): open(f'i{n}', 'w').close()",
    ]
    assert escapes(*attempts) == []
    assert run("open('x', 'w').write('y')", "assert open('/tmp/x').read() == 'y'").passed == (True,)


def test_processes_can_be_neither_started_nor_seen() -> None:
    python = sys.executable
    attempts = [
        "os.fork()",
        f"os.execv({python!r}, ['python', '-c', ''])",
        f"os.posix_spawn({python!r}, ['python', '-c', ''], {{}})",
        "import subprocess; subprocess.run(['true'])",
        "import multiprocessing as m; m.get_context('fork').Process(target=print).start()",
        f"os.kill({os.getpid()}, 0)",
        "assert libc.syscall(57) >= 0",
        "assert libc.syscall(435, bytes(88), 88) >= 0",
        "while True: os.fork()",
    ]
    assert escapes(*attempts) == []


def test_dropped_privileges_cannot_be_regained() -> None:
    attempts = [
        "os.setuid(0)",
        "os.setgid(0)",
        "assert libc.unshare(0x10000000) == 0",
        "assert libc.mount(b'x', b'/tmp', b'tmpfs', 0, None) == 0",
        "assert libc.umount2(b'/tmp', 2) == 0",
        "assert libc.ptrace(16, 1, None, None) == 0",
        "assert libc.syscall(319, b'x', 0) >= 0",
        "assert libc.syscall(425, 1, bytes(120)) >= 0",
        "assert libc.shmget(0, 1 << 20, 0o1600) >= 0",
        "assert libc.syscall(0x40000000 + 39) >= 0",
        "import resource as r\ntry: r.setrlimit(r.RLIMIT_AS, (1 << 40, 1 << 40))\nexcept ValueError: raise OSError",
        "os.kill(1, 9); import time; time.sleep(0.1); os.kill(1, 0); raise OSError",
    ]
    assert escapes(*attempts) == []


def test_memory_and_threads_are_limited() -> None:
    threads = "import threading\nstop = threading.Event()\n"
    attempts = [
        "x = bytearray(300 << 20)",
        "import mmap; mmap.mmap(-1, 300 << 20)",
        threads + "try:\n    for _ in range(9): threading.Thread(target=stop.wait, daemon=True).start()\n"
        "finally: stop.set()",
    ]
    assert escapes(*attempts) == []
    started = threads + "for _ in range(2): threading.Thread(target=stop.wait, daemon=True).start()\nstop.set()"
    assert run("", started, "x = bytearray(50 << 20)").passed == (True, True)


def left() -> list[psutil.Process]:
    """Return the sandbox processes that do not belong to another test process."""
    own = psutil.Process()
    parent = own.parent() if "PYTEST_XDIST_WORKER" in os.environ else None
    workers = parent.children() if parent else [own]
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if str(sandbox.CHILD) in (process.info["cmdline"] or []):
            with contextlib.suppress(psutil.NoSuchProcess):
                found += [] if {*workers} - {own} & {*process.parents()} else [process]
    return found


@pytest.mark.parametrize(
    ("program", "wall_s", "ended"),
    [
        ("while True: pass", 60.0, "-9"),
        ("import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass", 60.0, "-9"),
        ("import time; time.sleep(60)", 1.0, "late"),
        ("import os, time; os.setsid(); os.close(3); time.sleep(60)", 1.0, "late"),
    ],
)
def test_program_that_does_not_end_is_killed(program: str, wall_s: float, ended: str) -> None:
    report = run("", "pass", program, "pass", wall_s=wall_s)
    assert (report.passed, report.broken, report.ended) == ((True, False, False), (), ended)
    assert left() == []


@pytest.mark.parametrize(
    "program",
    [
        "raise SystemExit(0)",
        "import os; os._exit(0)",
        "import sys; sys.exit()",
        "x = ",
        "import os; os.write(3, b'0 passed\\n' * 9)",
        "import os\nwhile True: os.write(3, bytes(1 << 16))",
        "print('passed', flush=True)",
        "import os, signal; os.kill(os.getpid(), 9)",
        "(" * 5000,
        "def f(): f()\nf()",
    ],
)
def test_no_test_passes_if_a_program_exits_early_or_prints_passed(program: str) -> None:
    assert run(program, "assert False", "assert answer == 1", wall_s=1.5).passed == (False, False)


def test_order_of_a_set_is_always_the_same() -> None:
    program = "order = ''.join({'a', 'b', 'c', 'd', 'e', 'f'})"
    hashes = [run(program, *(f"assert order[0] == {letter!r}" for letter in "abcdef")).passed for _ in range(3)]
    assert hashes[0] == hashes[1] == hashes[2]
    assert sum(hashes[0]) == 1


def test_missing_limit_is_named_if_the_machine_cannot_enforce_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source = sandbox.CHILD.read_text()
    broken = {
        'check("new namespaces (unshare)", libc.unshare(NEW_NAMESPACES))': 'check("new namespaces (unshare)", 1)',
        "        filter_calls()\n": "",
        "        limit(job": "        str(job",
    }
    expected = ("new namespaces (unshare)", "there is no network", "memory is limited")
    for (whole, part), what in zip(broken.items(), expected, strict=True):
        assert whole in source
        monkeypatch.setattr(sandbox, "CHILD", tmp_path / "child.py")
        sandbox.CHILD.write_text(source.replace(whole, part))
        with pytest.raises(InputError, match=r"^here: this machine can't run code in a sandbox: ") as caught:
            check_confinement(LIMITS, "here")
        assert what in str(caught.value)


def test_error_if_the_sandbox_ends_without_a_report(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sandbox, "CHILD", tmp_path / "child.py")
    sandbox.CHILD.write_text("raise SystemExit(3)")
    with pytest.raises(RewardError, match=r"its process ended without a report \(exit code 3\)"):
        run("", "pass")


def item(response: str, **columns: Any) -> ScoreRequest:
    return ScoreRequest("i", "p", response, columns)


def test_reward_of_code_is_the_share_of_passed_tests() -> None:
    response = "Here:\n```python\ndef double(x):\n    return x + 2\n```\n"
    tests = ["assert double(2) == 4", "assert double(3) == 6"]
    rule = code_rule(CodeConfig(kind="code"))
    assert rule(item(response, references=tests)) == (0.5, {"num_tests": 2.0, "num_passed": 1.0})
    assert code_rule(CodeConfig(kind="code", all_or_nothing=True))(item(response, references=tests))[0] == 0.0
    other = code_rule(CodeConfig(kind="code", tests="unit_tests"))
    assert other(item("def double(x): return 2 * x", unit_tests=tests))[0] == 1.0
    assert other(item("no code at all", unit_tests=tests[0]))[0] == 0.0


def test_passed_tests_count_if_cpu_or_wall_time_runs_out() -> None:
    busy = CodeConfig(kind="code", cpu_s=1, wall_s=60)
    assert code_rule(busy)(item("x = 1", references=["assert x", "while x: pass"]))[0] == 0.5
    waiting = CodeConfig(kind="code", cpu_s=1, wall_s=3)
    assert code_rule(waiting)(item("import time", references=["pass", "time.sleep(60)"]))[0] == 0.5


@pytest.mark.parametrize(
    ("wall_s", "slowdown", "num_preempted", "is_error"),
    [(15, 2.9, 100, False), (15, 3.1, 100, True), (15, 9.0, 20, False), (5, 1.2, 100, False)],
)
def test_error_only_if_the_machine_could_not_give_the_cpu_time(
    monkeypatch: pytest.MonkeyPatch, wall_s: float, slowdown: float, num_preempted: int, is_error: bool
) -> None:
    report = Report((True, False), (), "late", slowdown, num_preempted)
    monkeypatch.setattr(code_rule_module, "run_confined", lambda *_: report)
    rule, response = code_rule(CodeConfig(kind="code", wall_s=wall_s)), item("x", references=["pass", "pass"])
    if is_error:
        with pytest.raises(RewardError, match="the machine is too busy: 15 s did not give i its 5 s of CPU"):
            rule(response)
    else:
        assert rule(response)[0] == 0.5


@pytest.mark.parametrize(
    ("columns", "what"),
    [
        ({}, "i has no references"),
        ({"references": []}, "i has no references"),
        ({"references": [1]}, "a test of i is not text"),
        ({"references": ["assert (", "pass"]}, "test 0 of i is not valid Python"),
    ],
)
def test_error_if_an_item_has_no_runnable_tests(columns: dict[str, Any], what: str) -> None:
    with pytest.raises(RewardError) as caught:
        code_rule(CodeConfig(kind="code"))(item("x = 1", **columns))
    assert caught.value.what == what


async def test_code_scorer_scores_items_concurrently() -> None:
    config = RewardServiceConfig(scorer="code", scorers={"code": CodeConfig(kind="code", cpu_s=1, num_processes=2)})
    scorer = build_scorer(config, None)
    items = [item(f"x = {number}", references="assert x < 2") for number in range(3)]
    outcomes = await scorer.score([*items, item("x = 1")])
    assert [outcome.reward for outcome in outcomes if isinstance(outcome, Score)] == [1.0, 1.0, 0.0]
    assert str(outcomes[-1]) == "code: i has no references"
    await close(scorer)


def test_code_scorer_is_rejected_if_the_machine_has_no_sandbox(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sandbox, "CHILD", tmp_path / "child.py")
    sandbox.CHILD.write_text('print(\'{"unconfined": "no namespaces"}\')')
    config = RewardServiceConfig(scorer="a", scorers={"a": CodeConfig(kind="code")})
    with pytest.raises(InputError, match=r"this machine can't run code in a sandbox: no namespaces$") as caught:
        build_scorer(config, None)
    assert caught.value.where == "reward_service.scorers.a"
