"""Kill the driver of a submitted job and submit it again, on a separate Ray head.

Minutes, for `make chaos`.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from cluster.journal.history import History
from tests.deploy.commands.test_submit import Head, head
from tests.runs.test_commands import metrics, wait_for
from tests.support.paths import LETTERS, ROOT

pytestmark = [pytest.mark.chaos, pytest.mark.ray, pytest.mark.timeout(1200)]

NUM_STEPS, B = 24, 8
assert head, "the fixture"


def submit(head: Head, runs: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "deploy.cli", "submit", LETTERS, "--address", head.address]
    options = ["--runs-dir", str(runs), "--name", "again", "--set", f"learner.num_steps = {NUM_STEPS}"]
    pipe = subprocess.PIPE
    environment = {**head.environment(), "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([*command, *options], cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True)


def driver_of(runs: Path, submitting: subprocess.Popen[str]) -> psutil.Process:
    """The process that the job is: the python that trains into that folder."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        is_python = bool(words) and "python" in Path(words[0]).name
        if is_python and "train" in words and str(runs) in words and process.pid != submitting.pid:
            found.append(process)
    return found[-1]


def test_a_job_resumes_when_submitted_again_after_its_driver_dies(head: Head, tmp_path: Path) -> None:
    run = tmp_path / "again"
    first = submit(head, tmp_path)
    wait_for(lambda: len(metrics(run)) >= 8, first, timeout_s=500)
    driver_of(tmp_path, first).kill()
    first.communicate(timeout=120)
    assert first.returncode == 1
    num_done = len(metrics(run))
    assert num_done < NUM_STEPS
    second = submit(head, tmp_path)
    output, errors = second.communicate(timeout=600)
    assert second.returncode == 0, errors
    assert "ppo: resumes from checkpoint step 5" in output + errors
    counts = History(run / "records").counts()
    assert (counts.num_admitted, counts.num_trained, counts.num_open) == (B * NUM_STEPS, B * NUM_STEPS, 0)
    assert [row["step"] for row in metrics(run)] == list(range(1, NUM_STEPS + 1))
