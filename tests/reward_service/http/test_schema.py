"""The HTTP server against its OpenAPI document: generated requests get documented responses, never a 5xx."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from reward_service.feedback.routes import feedback_router
from reward_service.feedback.selection import FeedbackSettings
from reward_service.feedback.store import FeedbackStore
from tests.reward_service.http.test_server import serve
from tests.support.paths import ROOT

TOKEN = "a token"
CONFIG = ROOT / "tests" / "support" / "schemathesis.toml"
LARGE = 256
"""Bounds beyond this are not made up to: bodies of megabytes cost minutes, and other tests send them."""


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Start the whole app with feedback, labelling page and a token."""
    store = FeedbackStore(tmp_path_factory.mktemp("schema") / "feedback.sqlite")
    for host, port in serve(token=TOKEN, routers=[feedback_router(store, settings=FeedbackSettings())]):
        yield f"http://{host}:{port}"
    store.close()


def run_schemathesis(url: str, folder: Path, *options: str) -> int:
    """Generate requests to every operation; returns their number."""
    authorization = f"Bearer {TOKEN}"
    document = httpx.get(f"{url}/openapi.json", headers={"Authorization": authorization}, trust_env=False).json()
    (folder / "openapi.json").write_text(json.dumps(_of_modest_size(document)))
    command = [str(Path(sys.executable).parent / "schemathesis"), "--config-file", str(CONFIG), "run"]
    command += ["--checks", "all", "--seed", "1", "--no-color", "--header", f"Authorization: {authorization}"]
    command += ["--generation-database", "none", *options, "--url", url, "openapi.json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    num_operations = sum(len(methods) for methods in document["paths"].values())
    assert f"Tested: {num_operations}\n" in output, output
    generated = re.search(r"([\d,]+) generated", output)
    assert generated, output
    return int(generated[1].replace(",", ""))


def _of_modest_size(schema: Any) -> Any:
    """Return the schema without large upper bounds."""
    if isinstance(schema, dict):
        bounds = {name for name in ("maxLength", "maxItems", "maxProperties") if _is_large(schema.get(name))}
        return {name: _of_modest_size(value) for name, value in schema.items() if name not in bounds}
    return [_of_modest_size(value) for value in schema] if isinstance(schema, list) else schema


def _is_large(bound: Any) -> bool:
    return isinstance(bound, int) and bound > LARGE


@pytest.mark.process
def test_generated_requests_are_answered_as_documented(url: str, tmp_path: Path) -> None:
    run_schemathesis(url, tmp_path, "--phases", "coverage,fuzzing", "--max-examples", "5")


@pytest.mark.chaos
@pytest.mark.timeout(1800)
def test_ten_thousand_generated_requests_are_answered_as_documented(url: str, tmp_path: Path) -> None:
    assert run_schemathesis(url, tmp_path, "--max-examples", "1000") >= 10_000
