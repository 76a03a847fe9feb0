from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import APIRouter

from cluster.actors.remote import within
from cluster.errors import BatchFailed, DeadlineExceeded, RewardError, RewardUnavailable
from cluster.scoring import Outcome, Score, ScoreRequest
from cluster.user_code import load
from reward_service.backend import Backend, ScorerInfo
from reward_service.config.service import HttpConfig, RewardServiceConfig
from reward_service.http.routes import build_app
from reward_service.http.tokens import TokenBook
from reward_service.serving.replica import RewardService
from tests.support.functions import InProcessScorer


class ServiceBackend:
    """A replica in this process, as the HTTP server calls it."""

    def __init__(self, service: RewardService) -> None:
        self._service = service

    async def score(self, requests: Any, *, scorer: str | None, timeout_s: float) -> list[Outcome]:
        outcomes: list[Outcome] = await within(
            self._service.outcomes(requests, scorer), timeout_s, where="reward_service", waited_for="the scorer"
        )
        return outcomes

    async def models(self, *, timeout_s: float) -> list[ScorerInfo]:
        return await self._service.models()


def client_of(
    scorer: str = "length",
    *,
    token: str | None = None,
    tokens: Path | None = None,
    timeout_s: float = 10.0,
    backend: Backend | None = None,
    routers: Sequence[APIRouter] = (),
    **limits: Any,
) -> httpx.AsyncClient:
    path = f"tests.support.scorers:{scorer}"
    service = RewardService(RewardServiceConfig(scorer=path))
    service.take({path: InProcessScorer(path, load(path, "here"))})
    app = build_app(
        backend or ServiceBackend(service),
        tokens=TokenBook(token, tokens),
        limits=HttpConfig(**limits),
        timeout_s=timeout_s,
        routers=routers,
    )
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://localhost")


async def test_rewards_have_ids_parts_and_version() -> None:
    body = {"prompts": ["p", "p"], "responses": ["a", "bb"], "ids": ["x", "y"]}
    answer = await client_of().post("/v1/rewards", json=body)
    assert answer.status_code == 200
    none = {"error": None, "unavailable": False, "batch_failed": False}
    assert answer.json()["rewards"] == [
        {"id": "x", "reward": 1.0, "parts": {"length": 1.0}} | none,
        {"id": "y", "reward": 2.0, "parts": {"length": 2.0}} | none,
    ]
    assert answer.json()["model_version"].startswith("tests.support.scorers:length@")


async def test_ids_default_to_positions() -> None:
    body = {"prompts": ["p", "p"], "responses": ["a", "b"], "references": ["a", "a"]}
    answer = await client_of("equals_reference").post("/v1/rewards", json=body)
    assert [(item["id"], item["reward"]) for item in answer.json()["rewards"]] == [("0", 1.0), ("1", 0.0)]


async def test_item_that_cannot_be_scored_has_a_null_reward_and_error() -> None:
    answer = await client_of("wrong_on_demand").post(
        "/v1/rewards", json={"prompts": ["p", "p"], "responses": ["one", "nan"]}
    )
    good, bad = answer.json()["rewards"]
    assert good["reward"] == 1.0
    assert bad["reward"] is None
    assert bad["error"] == (
        "tests.support.scorers:wrong_on_demand: returned float nan, not a finite number (scoring 1)"
    )


@pytest.mark.parametrize(
    ("body", "status", "code", "field"),
    [
        ("{", 400, "malformed", None),
        ("[]", 422, "invalid", None),
        ('{"prompts": ["p"]}', 422, "invalid", "responses"),
        ('{"prompts": ["p"], "responses": [1]}', 422, "invalid", "responses.0"),
        ('{"prompts": ["p"], "responses": ["a", "b"]}', 422, "invalid", None),
        ('{"prompts": ["p", "p"], "responses": ["a", "b"], "ids": ["x", "x"]}', 422, "invalid", None),
        ('{"prompts": ["p"], "responses": ["a"], "reference": ["a"]}', 422, "invalid", "reference"),
        ('{"prompts": ["p"], "responses": ["a"], "references": [NaN]}', 400, "malformed", None),
        ('{"prompts": ["p"], "responses": ["\\ud800"]}', 400, "malformed", None),
        ('{"prompts": ["p"], "responses": ["a"], "scorer": "other"}', 422, "invalid", "scorer"),
        ('{"prompts": ["p"], "messages": [[]], "responses": ["a"]}', 422, "invalid", None),
        ('{"responses": ["a"]}', 422, "invalid", None),
        ('{"prompts": ["p"], "responses": ["a"], "columns": {"n": []}}', 422, "invalid", None),
        ('{"prompts": ["p"], "responses": ["a"], "timeout_s": 0}', 422, "invalid", "timeout_s"),
        ('{"prompts": ["p"], "responses": ["a"], "references": [1e999]}', 422, "invalid", "references"),
        ("[" * 10_000, 400, "malformed", None),
        ("[" + "[]," * 200_000 + "[]]", 400, "malformed", None),
        ('{"prompts": ["p"], "responses": ["' + "a" * 10 + "\\x00" + '"]}', 400, "malformed", None),
    ],
)
async def test_wrong_request_gets_the_error_format(body: str, status: int, code: str, field: str | None) -> None:
    answer = await client_of().post("/v1/rewards", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == status
    error = answer.json()["error"]
    assert (error["code"], error["field"]) == (code, field)
    assert error["message"]


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/nowhere", 404), ("GET", "/v1/rewards", 405)])
async def test_unknown_route_gets_the_error_format(method: str, path: str, status: int) -> None:
    answer = await client_of().request(method, path)
    assert answer.status_code == status
    assert set(answer.json()["error"]) == {"code", "message", "field"}


@pytest.mark.parametrize("path", ["/v1/rewards", "/openapi.json", "/nowhere"])
@pytest.mark.parametrize("authorization", [None, "Bearer wrong", "Basic secret", "Bearer", "secret", "Basic YTpi"])
async def test_every_route_is_rejected_without_the_token(path: str, authorization: str | None) -> None:
    headers = {"Authorization": authorization} if authorization else {}
    answer = await client_of(token="secret").post(path, headers=headers, content=b"{}")
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"].startswith("Bearer, Basic ")
    assert answer.json()["error"]["code"] == "unauthorized"


async def test_routes_answer_with_the_token_and_health_without() -> None:
    client = client_of(token="secret")
    assert (await client.get("/healthz")).json() == {"status": "ok"}
    answer = await client.get("/openapi.json", headers={"Authorization": "bearer secret"})
    assert "/v1/rewards" in answer.json()["paths"]


@pytest.mark.parametrize("chunked", [False, True])
async def test_body_beyond_the_limit_is_rejected_while_it_is_read(chunked: bool) -> None:
    read = 0

    async def chunks() -> Any:
        nonlocal read
        for _ in range(100):
            read += 1
            yield b" " * 1000

    content: Any = chunks() if chunked else b" " * 100_000
    headers = {"content-type": "application/json"}
    answer = await client_of(max_body_bytes=10_000).post("/v1/rewards", content=content, headers=headers)
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "too_large"
    if chunked:
        assert read < 30


async def test_error_at_the_deadline_if_the_scorer_is_slow() -> None:
    import threading

    release = threading.Event()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.support.scorers.time.sleep", lambda seconds: release.wait(10))
        answer = await client_of("slow", timeout_s=0.1).post("/v1/rewards", json={"prompts": ["p"], "responses": ["a"]})
        release.set()
    assert answer.status_code == 504
    assert answer.json()["error"]["code"] == "deadline_exceeded"


async def test_messages_and_columns_reach_the_scorer() -> None:
    seen: list[ScoreRequest] = []

    class Recording(ServiceBackend):
        async def score(self, requests: Any, *, scorer: str | None, timeout_s: float) -> list[Outcome]:
            seen.extend(requests)
            return [Score(request.id, 1.0, {}, "v") for request in requests]

    body = {"messages": [[{"role": "user", "content": "hello"}]], "responses": ["a"], "columns": {"level": [3]}}
    client = client_of(backend=Recording(RewardService(RewardServiceConfig())))
    assert (await client.post("/v1/rewards", json=body)).status_code == 200
    assert seen == [ScoreRequest("0", "", "a", {"level": 3, "messages": [{"role": "user", "content": "hello"}]})]


class Refusing:
    """A backend that never scores."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    async def score(self, requests: Any, *, scorer: str | None, timeout_s: float) -> list[Outcome]:
        raise self._error

    async def models(self, *, timeout_s: float) -> list[ScorerInfo]:
        raise self._error


@pytest.mark.parametrize(
    ("error", "status", "retry_after"),
    [
        (RewardUnavailable("reward_service", "busy", 7.0), 503, "7"),
        (RewardUnavailable("reward_service", "gone"), 503, "1"),
        (DeadlineExceeded("reward_service", "waited 1 s"), 504, None),
    ],
)
@pytest.mark.parametrize("method_path", ["POST /v1/rewards", "GET /readyz", "GET /v1/models"])
async def test_retry_after_is_sent_if_the_backend_is_unavailable(
    error: Exception, status: int, retry_after: str | None, method_path: str
) -> None:
    method, path = method_path.split()
    body = {"prompts": ["p"], "responses": ["a"]} if method == "POST" else None
    answer = await client_of(backend=Refusing(error)).request(method, path, json=body)
    assert (answer.status_code, answer.headers.get("retry-after")) == (status, retry_after)
    assert (await client_of(backend=Refusing(error)).get("/healthz")).status_code == 200


async def test_models_are_listed_with_their_versions() -> None:
    body = (await client_of().get("/v1/models")).json()
    assert [(card["id"], card["default"]) for card in body["data"]] == [("tests.support.scorers:length", True)]
    assert body["data"][0]["versions"] == [body["data"][0]["version"]]


async def test_scorer_can_be_requested_by_version() -> None:
    client = client_of()
    version = (await client.get("/v1/models")).json()["data"][0]["version"]
    for scorer, status in (
        (version, 200),
        ("tests.support.scorers:length", 200),
        ("tests.support.scorers:length@other", 422),
    ):
        body = {"prompts": ["p"], "responses": ["a"], "scorer": scorer}
        answer = await client.post("/v1/rewards", json=body)
        assert answer.status_code == status
    assert answer.json()["error"]["field"] == "scorer"


async def test_openrlhf_gets_its_rewards_scores_and_logs() -> None:
    body = {"query": ["p: a", "p: bb"], "prompts": ["p: ", "p: "], "labels": ["x", "y"]}
    answer = await client_of().post("/get_reward", json=body)
    assert answer.json() == {"rewards": [1.0, 2.0], "scores": [1.0, 2.0], "extra_logs": {"length": [1.0, 2.0]}}
    whole = await client_of().post("/get_reward", json={"query": ["p: a"]})
    assert whole.json()["rewards"] == [4.0]
    wrong = await client_of().post("/get_reward", json={"query": ["p: a"], "prompts": ["q"]})
    assert wrong.status_code == 422
    assert "query 0 does not start with its prompt" in wrong.json()["error"]["message"]


async def test_openrlhf_call_fails_if_an_item_has_no_reward() -> None:
    body = {"query": ["a", "b"], "prompts": ["", ""], "labels": ["a", "a"]}
    assert (await client_of("equals_reference").post("/get_reward", json=body)).json()["rewards"] == [1.0, 0.0]
    answer = await client_of("wrong_on_demand").post("/get_reward", json={"query": ["one", "nan"]})
    assert (answer.status_code, answer.json()["error"]["field"]) == (422, "query.1")


@pytest.mark.parametrize(
    ("extra", "shown"),
    [({}, 0.9525741268224334), ({"use_activation": True}, 0.9525741268224334), ({"use_activation": False}, 3.0)],
)
async def test_verl_reads_the_last_probability_of_the_last_item(extra: dict[str, Any], shown: float) -> None:
    body = {"model": "/some/reward-model", "input": "abc", **extra}
    answer = (await client_of().post("/classify", json=body)).json()
    assert answer["data"][-1]["probs"][-1] == pytest.approx(shown)
    pooled = (await client_of().post("/pooling", json=body | {"input": ["x", "abc"]})).json()
    assert pooled["data"][-1]["data"][-1] == pytest.approx(shown)
    older = (await client_of().post("/classify", json={"input": "abc", "activation": False})).json()
    assert older["data"][-1]["probs"] == [3.0]


async def test_token_in_the_url_is_accepted() -> None:
    answer = await client_of(token="secret").post("http://antiphon:secret@service/get_reward", json={"query": ["a"]})
    assert answer.json()["rewards"] == [1.0]


async def test_too_many_requests_are_rejected_with_retry_after() -> None:
    started, release = asyncio.Event(), asyncio.Event()

    class Slow(Refusing):
        async def score(self, requests: Any, *, scorer: str | None, timeout_s: float) -> list[Outcome]:
            started.set()
            await release.wait()
            return [Score(request.id, 1.0, {}, "v") for request in requests]

    client = client_of(backend=Slow(RuntimeError()), max_waiting_requests=1)
    body = {"prompts": ["p"], "responses": ["a"]}
    first = asyncio.create_task(client.post("/v1/rewards", json=body))
    await started.wait()
    refused = await client.post("/v1/rewards", json=body)
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
    release.set()
    assert (await first).status_code == 200


async def test_health_is_answered_under_load_and_takes_no_body() -> None:
    client = client_of(max_waiting_requests=1, token="secret")
    assert (await client.get("/healthz")).status_code == 200
    refused = await client.post("/healthz", content=b"{}")
    assert (refused.status_code, refused.headers["connection"]) == (413, "close")


@pytest.mark.parametrize(
    ("host", "status"), [("localhost:80", 200), ("127.0.0.1", 200), ("[::1]:8", 200), ("evil.example", 403)]
)
async def test_only_localhost_names_are_answered_without_a_token(host: str, status: int) -> None:
    assert (await client_of().get("/v1/models", headers={"host": host})).status_code == status
    authorized = {"host": host, "authorization": "Bearer secret"}
    assert (await client_of(token="secret").get("/v1/models", headers=authorized)).status_code == 200


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/rewards", '{"prompts": ["p"], "responses": ["a"], "ids": [' + "1," * 300_000 + "1]}"),
        ("/v1/rewards", '{"prompts": ["p"], "responses": ["a"], "references": [' + "1," * 300_000 + "1]}"),
        ("/v1/rewards", "{" + ",".join(f'"{i}": 1' for i in range(60_000)) + "}"),
        ("/get_reward", '{"query": ["a"], "prompts": [' + "1," * 300_000 + "1]}"),
        ("/classify", '{"input": [' + "1," * 300_000 + "1]}"),
    ],
)
async def test_body_with_very_many_values_is_rejected_quickly(path: str, body: str) -> None:
    started = time.monotonic()
    answer = await client_of().post(path, content=body, headers={"content-type": "application/json"})
    assert answer.status_code in (400, 422)
    assert time.monotonic() - started < 1.5


async def test_item_is_marked_if_a_retry_or_another_batch_may_succeed() -> None:
    class Halting(Refusing):
        async def score(self, requests: Any, *, scorer: str | None, timeout_s: float) -> list[Outcome]:
            kinds = (RewardUnavailable, RewardError, BatchFailed)
            return [kind("judge", what) for kind, what in zip(kinds, ("busy", "no number", "raised"), strict=True)]

        async def models(self, *, timeout_s: float) -> list[ScorerInfo]:
            return [ScorerInfo("judge", "judge@1", ("judge@1",), is_default=True)]

    client = client_of(backend=Halting(RuntimeError()))
    body = {"prompts": ["p", "p", "p"], "responses": ["a", "b", "c"]}
    answer = (await client.post("/v1/rewards", json=body)).json()
    assert [(item["error"], item["unavailable"], item["batch_failed"]) for item in answer["rewards"]] == [
        ("judge: busy", True, False),
        ("judge: no number", False, False),
        ("judge: raised", False, True),
    ]
    foreign = await client.post("/get_reward", json={"query": ["a", "b", "c"]})
    assert (foreign.status_code, foreign.headers["retry-after"]) == (503, "1")


async def test_pending_bodies_beyond_the_total_limit_are_rejected() -> None:
    answer = await client_of(max_buffered_bytes=1000).post("/v1/rewards", content=b" " * 2000)
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")


async def test_compressed_body_is_rejected_unread() -> None:
    headers = {"content-encoding": "gzip", "content-type": "application/json"}
    answer = await client_of().post("/v1/rewards", content=b"\x1f\x8b", headers=headers)
    assert (answer.status_code, answer.headers["connection"]) == (415, "close")


async def test_requests_and_items_are_counted_for_prometheus() -> None:
    client = client_of("wrong_on_demand")
    await client.post("/v1/rewards", json={"prompts": ["p", "p"], "responses": ["one", "nan"]})
    await client.get("/nowhere")
    text = (await client.get("/metrics")).text
    assert 'antiphon_items_total{outcome="reward"} 1.0' in text
    assert 'antiphon_items_total{outcome="error"} 1.0' in text
    assert 'antiphon_requests_total{method="POST",route="/v1/rewards",status="200"} 1.0' in text
    assert 'antiphon_requests_total{method="any",route="none",status="404"} 1.0' in text
    assert "antiphon_requests_in_flight 1.0" in text


async def test_version_lookup_shares_the_deadline_of_the_request() -> None:
    asked: list[tuple[str, float]] = []

    class Slow(Refusing):
        async def score(self, requests: Any, *, scorer: str | None, timeout_s: float) -> list[Outcome]:
            asked.append(("score", timeout_s))
            await asyncio.sleep(0.05)
            return [RewardError("judge", "no number") for _ in requests]

        async def models(self, *, timeout_s: float) -> list[ScorerInfo]:
            asked.append(("models", timeout_s))
            await asyncio.sleep(0.05)
            return [ScorerInfo("judge", "judge@1", ("judge@1",), is_default=True)]

    client = client_of(backend=Slow(RuntimeError()), timeout_s=0.5)
    await client.post("/v1/rewards", json={"prompts": ["p"], "responses": ["a"], "timeout_s": 0.2})
    await client.post("/classify", json={"input": "a", "model": "judge"})
    assert [call for call, _ in asked] == ["score", "models", "models", "score"]
    assert [timeout_s < limit_s for (_, timeout_s), limit_s in zip(asked, (0.21, 0.16, 0.51, 0.46), strict=True)] == [
        True
    ] * 4
