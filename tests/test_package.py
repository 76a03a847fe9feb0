"""The built wheel, installed outside of the checkout: commands, a new task, its training and its services."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.support.paths import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.ray]
NOT_COPIED = shutil.ignore_patterns(
    ".*", "__pycache__", "build", "runs", "tests", "benchmarks", "*.egg-info", "requirements"
)


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the source distribution, built from a copy of the checkout."""
    folder = tmp_path_factory.mktemp("package")
    shutil.copytree(ROOT, folder / "source", ignore=NOT_COPIED)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder / "dist")]
    done = subprocess.run(command, cwd=folder / "source", capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "dist"


@pytest.fixture(scope="module")
def python(dist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a new virtual environment with the wheel; the dependencies are those of this environment."""
    folder = tmp_path_factory.mktemp("venv")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True, timeout=120)
    python = folder / "bin" / "python"
    (site,) = folder.glob("lib/python*/site-packages")
    # Python reads no .pth files in a folder that a .pth file adds: an editable installation there has no effect.
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    (wheel,) = dist.glob("*.whl")
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)]
    done = subprocess.run(install, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return python


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory outside of the checkout."""
    return tmp_path_factory.mktemp("elsewhere")


def environment() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "ANTIPHON_TOKEN")}


def antiphon(python: Path, folder: Path, *arguments: str) -> str:
    """Run the installed command; returns its stdout."""
    command = [str(python.with_name("antiphon")), *arguments]
    done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@contextmanager
def serving(python: Path, folder: Path, *arguments: str) -> Iterator[str]:
    """Run a command that listens on a free port; yields the URL that it prints and interrupts it at the end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(python.with_name("antiphon")), *arguments, "--port", str(port)]
    process = subprocess.Popen(command, cwd=folder, env=environment(), stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline().strip()
        assert line.startswith(f"listening on http://127.0.0.1:{port}"), line
        yield line.removeprefix("listening on ")
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        process.communicate()


def test_the_distributions_contain_the_packages_and_the_example_tasks(dist: Path) -> None:
    (wheel,), (source,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
    names = zipfile.ZipFile(wheel).namelist()
    packages = {name.partition("/")[0] for name in names} - {name for name in names if "/" not in name}
    information = {name for name in packages if name.endswith(".dist-info")}
    assert packages - information == {"cluster", "rollout_actors", "reward_service", "learner", "deploy"}
    for name in ("deploy/templates/letters/run.toml", "reward_service/feedback/page/page.html", "deploy/py.typed"):
        assert name in names
    with tarfile.open(source) as archive:
        members = {member.partition("/")[2] for member in archive.getnames()}
    assert {"examples/letters/run.toml", "setup.py", "README.md", "LICENSE"} <= members


def test_the_installed_command_runs_outside_of_the_checkout(python: Path, folder: Path) -> None:
    code = "import deploy, importlib.util; print(deploy.__file__); assert importlib.util.find_spec('examples') is None"
    done = subprocess.run(
        [str(python), "-c", code], cwd=folder, env=environment(), capture_output=True, text=True, timeout=60
    )
    assert done.stdout.startswith(str(python.parent.parent)), done.stderr
    assert antiphon(python, folder, "--version").startswith("antiphon ")
    assert "  antiphon train mine/run.toml" in antiphon(python, folder, "new", "mine", "--from", "letters")
    assert antiphon(python, folder, "check", "mine/run.toml").endswith("ok\n")


@pytest.fixture(scope="module")
def run(python: Path, folder: Path) -> Path:
    """A new task, trained."""
    antiphon(python, folder, "new", "trained", "--from", "letters")
    antiphon(python, folder, "train", "trained/run.toml", "--set", "learner.num_steps = 2")
    return folder / "runs" / "trained"


def test_a_new_task_is_trained_with_the_installed_command(run: Path) -> None:
    assert (run / "policy" / "model.safetensors").exists()


def test_the_installed_reward_service_and_labelling_page_answer(python: Path, folder: Path, run: Path) -> None:
    with serving(python, folder, "serve-rewards", str(run)) as url, httpx.Client(trust_env=False) as http:
        answer = http.post(f"{url}/v1/rewards", json={"prompts": ["p"], "responses": ["a b a"]}, timeout=60)
        assert answer.json()["rewards"][0]["error"] is None, answer.text
    with (
        serving(python, folder, "label", str(run), "--num-pairs", "2") as url,
        httpx.Client(trust_env=False) as http,
    ):
        assert "Which response is better?" in http.get(url, timeout=60).text
