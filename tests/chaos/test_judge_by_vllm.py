"""The judge asks a policy of ours that vLLM serves."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from cluster.errors import RewardError
from cluster.scoring import Score, ScoreRequest
from examples.letters.model import build_model
from reward_service.config.scorers import JudgeConfig
from reward_service.scorers.judge import JudgeScorer

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(600)]
TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"
RUBRIC = "{response}:"


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A policy of the letters task behind vLLM's own server."""
    folder = tmp_path_factory.mktemp("policy")
    build_model(folder, seed=0)
    (folder / "template.jinja").write_text(TEMPLATE)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    arguments = ["--model", str(folder), "--served-model-name", "ours", "--port", port, "--enforce-eager"]
    arguments += ["--max-model-len", "128", "--max-num-batched-tokens", "256", "--max-num-seqs", "8"]
    arguments += ["--no-enable-chunked-prefill", "--chat-template", str(folder / "template.jinja")]
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *arguments]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            _await_health(f"http://127.0.0.1:{port}/health", process, folder / "log")
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()
            process.wait()


def _await_health(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(3000):
        if process.poll() is not None:
            raise AssertionError(log.read_text()[-3000:])
        try:
            if httpx.get(url, trust_env=False).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise AssertionError("vLLM did not come up")


async def test_judge_reads_the_number_that_vllm_answers_with_our_policy(url: str) -> None:
    config = JudgeConfig(kind="judge", url=url, model="ours", rubric=RUBRIC, max_tokens=16, pattern=r"(\d)")
    judge = JudgeScorer("judge", config)
    requests = [ScoreRequest(str(i), "", "bcdefgh"[: 1 + i % 7]) for i in range(12)]
    outcomes = await judge.score(requests)
    await judge.aclose()
    async with httpx.AsyncClient(trust_env=False, timeout=60) as http:
        for request, outcome in zip(requests, outcomes, strict=True):
            messages = [{"role": "user", "content": RUBRIC.replace("{response}", request.response)}]
            body = {"model": "ours", "messages": messages, "temperature": 0.0, "max_tokens": 16}
            answer = (await http.post(f"{url}/chat/completions", json=body)).json()
            opinion = answer["choices"][0]["message"]["content"]
            digits = [character for character in opinion if character.isdigit()]
            if digits:
                assert isinstance(outcome, Score)
                assert outcome.reward == float(digits[-1])
            else:
                assert isinstance(outcome, RewardError)
                assert opinion in outcome.what
