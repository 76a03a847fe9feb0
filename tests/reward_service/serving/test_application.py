"""The application on a real Ray Serve, by handle and by HTTP."""

from __future__ import annotations

import asyncio
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
from ray import serve
from ray.serve.exceptions import RayServeException

from cluster.actors.remote import find_actor, kill_actor, start_actor
from cluster.errors import InputError, RewardError, RewardUnavailable
from cluster.scoring import Score, ScoreRequest
from reward_service.client.handle import HandleRewardClient
from reward_service.client.http import HttpRewardClient
from reward_service.client.retrying import RetryingRewardClient
from reward_service.config.service import RewardServiceConfig, app_name
from reward_service.scorers.reward_model import RewardModelScorer
from reward_service.serving.application import (
    http_server_ended,
    num_scored,
    publish_reward_model,
    service_url,
    start_reward_service,
    stop_reward_service,
)
from reward_service.serving.http_actor import http_actor_name
from tests.support.building import moved_model, replica_pids, scores_of
from tests.support.paths import ROOT

pytestmark = pytest.mark.ray
TOKEN = "a token of this test"
ITEMS = [ScoreRequest(f"7-{i}-0", "say ", "abc" * (1 + i % 9)) for i in range(48)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


TEMPLATES = {
    "said": "{% for message in messages %}{{ message.content }} {% endfor %}",
    "named": "{% for message in messages %}{{ message.role }} {{ message.content }}. {% endfor %}",
}


@pytest.fixture(scope="module")
def talking(reward_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two reward models by name, each with its own chat template."""
    folders = {}
    for number, (name, template) in enumerate(TEMPLATES.items()):
        folders[name] = moved_model(reward_model_folder, tmp_path_factory.mktemp("talking") / name, by=number + 1.0)
        (folders[name] / "chat_template.jinja").write_text(template)
    return folders


@pytest.fixture(scope="module")
def url(ray_session: None, reward_model_folder: Path, talking: dict[str, Path]) -> Iterator[str]:
    """Start the service of the run `models` with three reward models and a token; returns its URL."""
    serve.shutdown()
    scorers = {name: {"kind": "reward_model", "path": str(folder)} for name, folder in talking.items()}
    config = RewardServiceConfig.model_validate({"port": free_port(), "num_cpus": 0.1, "scorers": scorers})
    start_reward_service(config, name="models", reward_model_path=reward_model_folder, token=TOKEN)
    yield service_url(config)
    serve.shutdown()


def close(scores: Sequence[Score], expected: Sequence[Any]) -> bool:
    """Return whether two lists of scores agree to 1e-6 and have the same versions."""
    return all(
        score.scorer_version == wanted.scorer_version
        and math.isclose(score.reward, wanted.reward, rel_tol=0, abs_tol=1e-6)
        for score, wanted in zip(scores, expected, strict=True)
    )


def start_function(name: str, scorer: str, **settings: Any) -> Any:
    config = RewardServiceConfig(scorer=f"tests.support.scorers:{scorer}", num_cpus=0.1, drain_timeout_s=1, **settings)
    return start_reward_service(config, name=name, reward_model_path=None, token=None)


def test_wrong_settings_are_rejected_before_anything_starts() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=rf"^reward_service\.port: {port} is taken on 127\.0\.0\.1"):
            start_function("refused", "length", port=port)
    with pytest.raises(InputError, match=r"^reward_service\.host: 0\.0\.0\.0 can be reached from other machines"):
        start_function("refused", "length", host="0.0.0.0", port=free_port())
    with pytest.raises(InputError, match=r"^reward_service\.scorer: "):
        start_function("refused", "no_such")
    with pytest.raises(InputError, match=r"^reward_model: not trained"):
        start_reward_service(RewardServiceConfig(), name="refused", reward_model_path=None, token=None)


def test_cancelled_start_leaves_no_application(ray_session: None) -> None:
    cancelled = threading.Event()
    cancelled.set()
    config = RewardServiceConfig(scorer="tests.support.scorers:length", num_cpus=0.1)
    with pytest.raises(RewardError, match="its start was cancelled"):
        start_reward_service(config, name="unwanted", reward_model_path=None, token=None, cancelled=cancelled)
    assert app_name("unwanted") not in serve.status().applications


def test_stopping_without_serve_hides_no_other_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def delete(name: str) -> None:
        raise RayServeException("There is no Serve instance running on this Ray cluster.")

    monkeypatch.setattr(serve, "delete", delete)
    stop_reward_service("nobody")


async def test_handle_and_http_return_the_rewards_of_a_direct_forward(url: str, reward_model_folder: Path) -> None:
    expected = RewardModelScorer(reward_model_folder).score_batch(ITEMS)
    by_handle = await scores_of(HandleRewardClient("models", 60.0), ITEMS)
    http = HttpRewardClient(url, TOKEN, 60.0)
    by_http = await scores_of(http, ITEMS)
    await http.aclose()
    for item, offline, *scores in zip(ITEMS, expected, by_handle, by_http, strict=True):
        assert isinstance(offline, Score)
        for score in scores:
            assert (score.id, score.scorer_version) == (item.id, offline.scorer_version)
            assert math.isclose(score.reward, offline.reward, rel_tol=0, abs_tol=1e-6)


async def test_messages_are_rendered_by_each_models_chat_template(url: str, talking: dict[str, Path]) -> None:
    conversation = [{"role": "user", "content": "say abc"}]
    body = {"messages": [conversation], "responses": ["abc"]}
    rewards = set()
    async with httpx.AsyncClient(base_url=url, headers={"Authorization": f"Bearer {TOKEN}"}, trust_env=False) as http:
        for name, prompt in (("said", "say abc "), ("named", "user say abc. ")):
            (offline,) = RewardModelScorer(talking[name], name=name).score_batch([ScoreRequest("0", prompt, "abc")])
            assert isinstance(offline, Score)
            answer = (await http.post("/v1/rewards", json=body | {"scorer": name})).json()
            assert answer["model_version"] == offline.scorer_version
            assert answer["rewards"][0]["reward"] == pytest.approx(offline.reward, abs=1e-6)
            rewards.add(offline.reward)
    assert len(rewards) == 2


async def test_http_is_rejected_without_the_token(url: str) -> None:
    async with httpx.AsyncClient(base_url=url, trust_env=False) as http:
        assert (await http.get("/healthz")).status_code == 200
        assert (await http.get("/openapi.json")).status_code == 401
    wrong = HttpRewardClient(url, "wrong", 60.0)
    with pytest.raises(RewardError, match=r"^reward_service: .* answered 401"):
        await scores_of(wrong, ITEMS[:1])
    await wrong.aclose()


async def test_concurrent_calls_are_answered_and_counted(url: str) -> None:
    before = await asyncio.to_thread(num_scored, "models")
    client = HandleRewardClient("models", 60.0)
    calls = [scores_of(client, ITEMS[i % 40 : i % 40 + 8]) for i in range(100)]
    answers = await asyncio.gather(*calls)
    assert all(
        [score.id for score in answer] == [item.id for item in ITEMS[i % 40 : i % 40 + 8]]
        for i, answer in enumerate(answers)
    )
    assert await asyncio.to_thread(num_scored, "models") - before == 800


class Caller:
    """Holds a client in a separate process, as a rollout actor does."""

    def __init__(self, client: HandleRewardClient) -> None:
        self._client = client

    async def score(self, requests: list[ScoreRequest]) -> list[Score]:
        return await scores_of(self._client, requests)


async def test_client_can_be_sent_to_an_actor(url: str) -> None:
    caller = start_actor(Caller, HandleRewardClient("models", 60.0), name="caller")
    scores = await caller.score(ITEMS[:2])
    assert [score.id for score in scores] == [item.id for item in ITEMS[:2]]
    with pytest.raises(RewardError, match=r"^reward_model: long has 68 tokens"):
        await caller.score([ScoreRequest("long", "say ", "a" * 63)])
    kill_actor(caller)


async def test_waiting_calls_raise_if_the_service_is_deleted(url: str) -> None:
    await asyncio.to_thread(start_function, "gone", "slow")
    client = HandleRewardClient("gone", 60.0)
    waiting = asyncio.create_task(scores_of(client, ITEMS[:1]))
    with pytest.raises(RewardError, match=r"waited 0\.5 s for application antiphon-gone-rewards to score 1 responses"):
        await scores_of(HandleRewardClient("gone", 0.5), ITEMS[:1])
    started = time.monotonic()
    await asyncio.to_thread(stop_reward_service, "gone")
    with pytest.raises(RewardError, match=r"^reward_service: .*antiphon-gone-rewards"):
        await waiting
    for late in (client, HandleRewardClient("gone", 60.0)):
        with pytest.raises(RewardError, match=r"^reward_service: application antiphon-gone-rewards is gone"):
            await scores_of(late, ITEMS[:1])
    assert time.monotonic() - started < 20
    assert await scores_of(HandleRewardClient("models", 60.0), ITEMS[:1])


def version_of(outcomes: Sequence[Score | RewardError]) -> str:
    """Return the version of the scorer that gave the first score."""
    first = outcomes[0]
    assert isinstance(first, Score)
    return first.scorer_version


@pytest.mark.slow
async def test_new_version_is_served_without_a_failed_request(
    url: str, reward_model_folder: Path, tmp_path: Path
) -> None:
    other = moved_model(reward_model_folder, tmp_path / "other")
    old, new = (RewardModelScorer(folder).score_batch(ITEMS) for folder in (reward_model_folder, other))
    http = HttpRewardClient(url, TOKEN, 60.0)
    published = asyncio.create_task(asyncio.to_thread(publish_reward_model, "models", other))
    answers = []
    while not published.done():
        answers.append(await scores_of(http, ITEMS[:8]))
    await published
    answers.append(await scores_of(http, ITEMS[:8]))
    for answer in answers:
        expected = new if version_of(answer) == version_of(new) else old
        assert close(answer, expected[:8])
    assert [version_of(answers[i]) for i in (0, -1)] == [version_of(old), version_of(new)]
    older = HttpRewardClient(url, TOKEN, 60.0, scorer=version_of(old))
    assert close(await scores_of(older, ITEMS[:8]), old[:8])
    (pid,) = await asyncio.to_thread(replica_pids, "models")
    os.kill(pid, signal.SIGKILL)  # its replacement serves both versions too
    assert close(await scores_of(http, ITEMS[:8]), new[:8])
    assert close(await scores_of(older, ITEMS[:8]), old[:8])
    await older.aclose()
    await http.aclose()
    await asyncio.to_thread(publish_reward_model, "models", reward_model_folder)


async def test_folder_that_is_not_a_model_is_not_published(url: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no \*\.safetensors"):
        await asyncio.to_thread(publish_reward_model, "models", tmp_path)
    with pytest.raises(InputError, match="no such application runs"):
        await asyncio.to_thread(publish_reward_model, "nobody", tmp_path)
    assert await scores_of(HandleRewardClient("models", 60.0), ITEMS[:1])


async def test_restarted_service_uses_its_new_settings(ray_session: None) -> None:
    await asyncio.to_thread(start_function, "again", "length")
    client = HandleRewardClient("again", 60.0)
    (before,) = await scores_of(client, ITEMS[:1])
    await asyncio.to_thread(start_function, "again", "length_async", timeout_s=30.0)
    (after,) = await scores_of(client, ITEMS[:1])
    assert before.reward == after.reward == 3.0
    versions = [score.scorer_version.partition("@")[0] for score in (before, after)]
    assert versions == ["tests.support.scorers:length", "tests.support.scorers:length_async"]
    await asyncio.to_thread(stop_reward_service, "again")


@pytest.mark.slow
async def test_a_service_of_another_running_process_is_not_replaced(ray_session: None) -> None:
    address = ray.get_runtime_context().gcs_address
    code = (
        f"import ray, sys\nray.init({address!r}, log_to_driver=False)\n"
        "from tests.reward_service.serving.test_application import start_function\n"
        "start_function('owned', 'length')\nprint('started', flush=True)\nsys.stdin.read()\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    pipe = subprocess.PIPE
    owner = subprocess.Popen([sys.executable, "-c", code], env=environment, stdin=pipe, stdout=pipe, text=True)
    try:
        assert owner.stdout is not None
        assert await asyncio.to_thread(owner.stdout.readline) == "started\n"
        with pytest.raises(InputError, match="another process on this Ray serves rewards under this name"):
            await asyncio.to_thread(start_function, "owned", "length_async")
        (score,) = await scores_of(HandleRewardClient("owned", 60.0), ITEMS[:1])
        assert score.scorer_version.startswith("tests.support.scorers:length@")
    finally:
        owner.kill()
        owner.communicate()
    await asyncio.to_thread(start_once_free, "owned")
    (score,) = await scores_of(HandleRewardClient("owned", 60.0), ITEMS[:1])
    assert score.scorer_version.startswith("tests.support.scorers:length_async@")
    await asyncio.to_thread(stop_reward_service, "owned")


def start_once_free(name: str) -> None:
    """Start the application once Ray has noticed that the process that owned it has ended."""
    deadline = time.monotonic() + 30
    while True:
        try:
            start_function(name, "length_async")
            return
        except InputError:
            assert time.monotonic() < deadline
            time.sleep(0.2)


async def test_killed_http_server_listens_again_on_the_same_port(url: str) -> None:
    actor = find_actor(http_actor_name("models"))
    os.kill(await actor.pid(), signal.SIGKILL)
    patient = RetryingRewardClient(HttpRewardClient(url, TOKEN, 10.0), 60.0)
    scores = await patient.score(ITEMS[:2])
    await patient.aclose()
    assert [score.id for score in scores] == [item.id for item in ITEMS[:2]]


async def test_error_if_a_restarted_http_server_finds_its_port_taken(ray_session: None) -> None:
    port = free_port()
    await asyncio.to_thread(start_function, "robbed", "length", port=port)
    ended = asyncio.create_task(http_server_ended("robbed"))
    os.kill(await find_actor(http_actor_name("robbed")).pid(), signal.SIGKILL)
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        await _bound(taken, port)
        taken.listen()
        with pytest.raises(InputError, match=rf"^reward_service\.port: cannot listen on 127\.0\.0\.1:{port}: Address"):
            await ended
    await asyncio.to_thread(stop_reward_service, "robbed")


async def _bound(taken: socket.socket, port: int) -> None:
    """Bind the port of a process that was just killed."""
    for _ in range(1000):
        try:
            return taken.bind(("127.0.0.1", port))
        except OSError:
            await asyncio.sleep(0.001)
    raise AssertionError(f"{port} does not become free")


async def test_calls_of_a_dead_replica_are_answered_by_another(ray_session: None, tmp_path: Path) -> None:
    await asyncio.to_thread(start_function, "mortal", "die_once", num_replicas=2)
    mortal = [replace(item, columns={"references": str(tmp_path / "died")}) for item in ITEMS[:8]]
    scores = await asyncio.gather(*(scores_of(HandleRewardClient("mortal", 60.0), [item]) for item in mortal))
    assert (tmp_path / "died").exists()
    assert [score.id for (score,) in scores] == [item.id for item in ITEMS[:8]]
    await asyncio.to_thread(stop_reward_service, "mortal")


async def test_runs_on_one_cluster_have_separate_services_and_ports(url: str) -> None:
    port = free_port()
    await asyncio.to_thread(start_function, "second", "length_async", port=port)
    other = HttpRewardClient(f"http://127.0.0.1:{port}", None, 60.0)
    assert [score.reward for score in await scores_of(other, ITEMS[:2])] == [3.0, 6.0]
    await asyncio.to_thread(stop_reward_service, "second")
    with pytest.raises(RewardUnavailable):
        await scores_of(other, ITEMS[:1])
    await other.aclose()
    assert await scores_of(HandleRewardClient("models", 60.0), ITEMS[:1])
