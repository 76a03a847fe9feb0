"""The face against its own OpenAPI document: what schemathesis makes up is answered as documented, never by a 5xx."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.reward_service.test_http_server import serve

TOKEN = "a token"
CONFIG = Path(__file__).parent.parent / "schemathesis.toml"


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A face with a token."""
    for host, port in serve(token=TOKEN):
        yield f"http://{host}:{port}"


def run_schemathesis(url: str, *options: str) -> None:
    command = [
        str(Path(sys.executable).parent / "schemathesis"),
        "--config-file",
        str(CONFIG),
        "run",
        "--checks",
        "all",
    ]
    command += ["--seed", "1", "--header", f"Authorization: Bearer {TOKEN}", *options, f"{url}/openapi.json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_made_up_requests_are_answered_as_documented(url: str) -> None:
    run_schemathesis(url, "--phases", "fuzzing", "--max-examples", "10")


@pytest.mark.chaos
@pytest.mark.timeout(1800)
def test_ten_thousand_made_up_requests_are_answered_as_documented(url: str) -> None:
    run_schemathesis(url, "--max-examples", "2500")
