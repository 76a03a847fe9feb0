from __future__ import annotations

from typing import Any

import httpx
import pytest

from cluster.errors import RewardError
from cluster.scoring import ScoreRequest
from reward_service.client import HttpRewardClient
from reward_service.http_face import build_app
from reward_service.registry import load_function
from reward_service.scorer import FunctionScorer
from reward_service.service import RewardService


def face(scorer: str = "length", **settings: Any) -> httpx.AsyncClient:
    path = f"tests.scorers:{scorer}"
    service = RewardService(FunctionScorer(path, load_function(path)))
    app = build_app(service, **({"token": None, "timeout_s": 10.0} | settings))
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://service")


async def test_rewards_come_back_under_their_ids_with_parts_and_version() -> None:
    body = {"prompts": ["p", "p"], "responses": ["a", "bb"], "ids": ["x", "y"]}
    answer = await face().post("/v1/rewards", json=body)
    assert answer.status_code == 200
    assert answer.json()["rewards"] == [
        {"id": "x", "reward": 1.0, "parts": {"length": 1.0}, "error": None},
        {"id": "y", "reward": 2.0, "parts": {"length": 2.0}, "error": None},
    ]
    assert answer.json()["model_version"].startswith("tests.scorers:length@")


async def test_ids_are_positions_unless_given_and_references_reach_the_scorer() -> None:
    body = {"prompts": ["p", "p"], "responses": ["a", "b"], "references": ["a", "a"]}
    answer = await face("equals_reference").post("/v1/rewards", json=body)
    assert [(item["id"], item["reward"]) for item in answer.json()["rewards"]] == [("0", 1.0), ("1", 0.0)]


async def test_an_item_that_cannot_be_scored_has_a_null_reward_and_says_why() -> None:
    answer = await face("wrong_on_demand").post(
        "/v1/rewards", json={"prompts": ["p", "p"], "responses": ["one", "nan"]}
    )
    good, bad = answer.json()["rewards"]
    assert good["reward"] == 1.0
    assert bad["reward"] is None
    assert bad["error"] == ("tests.scorers:wrong_on_demand: returned float nan for 1, not a finite number")


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
        ('{"prompts": ["p"], "responses": ["a"], "references": [NaN]}', 422, "invalid", "references"),
        ('{"prompts": ["p"], "responses": ["\\ud800"]}', 422, "invalid", "responses"),
        ('{"prompts": ["p"], "responses": ["a"], "scorer": "other"}', 422, "invalid", "scorer"),
        ("[" * 100_000, 400, "malformed", None),
    ],
)
async def test_a_wrong_request_is_refused_in_one_shape(body: str, status: int, code: str, field: str | None) -> None:
    answer = await face().post("/v1/rewards", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == status
    error = answer.json()["error"]
    assert (error["code"], error["field"]) == (code, field)
    assert error["message"]


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/nowhere", 404), ("GET", "/v1/rewards", 405)])
async def test_routes_that_do_not_exist_are_refused_in_the_same_shape(method: str, path: str, status: int) -> None:
    answer = await face().request(method, path)
    assert answer.status_code == status
    assert set(answer.json()["error"]) == {"code", "message", "field"}


@pytest.mark.parametrize("path", ["/v1/rewards", "/openapi.json", "/nowhere"])
@pytest.mark.parametrize("authorization", [None, "Bearer wrong", "Basic secret", "Bearer", "secret"])
async def test_without_the_token_every_route_is_closed(path: str, authorization: str | None) -> None:
    headers = {"Authorization": authorization} if authorization else {}
    answer = await face(token="secret").post(path, headers=headers, content=b"{}")
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.json()["error"]["code"] == "unauthorized"


async def test_with_the_token_routes_are_open_and_health_needs_none() -> None:
    client = face(token="secret")
    assert (await client.get("/healthz")).json() == {"status": "ok"}
    answer = await client.get("/openapi.json", headers={"Authorization": "bearer secret"})
    assert "/v1/rewards" in answer.json()["paths"]


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_body_beyond_the_limit_is_refused_while_it_is_read(chunked: bool) -> None:
    read = 0

    async def chunks() -> Any:
        nonlocal read
        for _ in range(100):
            read += 1
            yield b" " * 1000

    content: Any = chunks() if chunked else b" " * 100_000
    headers = {"content-type": "application/json"}
    answer = await face(max_body_bytes=10_000).post("/v1/rewards", content=content, headers=headers)
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "too_large"
    if chunked:
        assert read < 20


async def test_a_scorer_past_its_deadline_is_an_error_not_a_wait() -> None:
    import threading

    import tests.scorers

    release = threading.Event()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tests.scorers.time, "sleep", lambda seconds: release.wait(10))
        answer = await face("slow", timeout_s=0.05).post("/v1/rewards", json={"prompts": ["p"], "responses": ["a"]})
        release.set()
    assert answer.status_code == 504
    assert answer.json()["error"]["code"] == "deadline_exceeded"


def client_answered(status: int, body: Any) -> HttpRewardClient:
    """A client whose service always answers that."""
    client = HttpRewardClient("http://service", None, 5.0)
    text = body if isinstance(body, str) else httpx.Response(status, json=body).text
    transport = httpx.MockTransport(lambda request: httpx.Response(status, text=text))
    client._client = httpx.AsyncClient(transport=transport)
    return client


@pytest.mark.parametrize(
    ("status", "body", "what"),
    [
        (503, "busy", "answered 503: busy"),
        (200, "no json", "JSONDecodeError"),
        (200, [], "no list of rewards"),
        (200, {"rewards": [], "model_version": "v"}, "0 scores for 1 responses"),
        (200, {"rewards": [{"id": "y", "reward": 1.0}], "model_version": "v"}, "a score for y where x was asked"),
        (200, {"rewards": [{"id": "x", "reward": "1"}], "model_version": "v"}, "'1' for x, not a number"),
        (200, {"rewards": [{"id": "x", "reward": None}], "model_version": "v"}, "no reward for x"),
        (200, '{"rewards": [{"id": "x", "reward": NaN}], "model_version": "v"}', "nan for x, not a finite"),
    ],
)
async def test_the_http_client_takes_no_wrong_answer_for_a_reward(status: int, body: Any, what: str) -> None:
    with pytest.raises(RewardError) as caught:
        await client_answered(status, body).score([ScoreRequest("x", "p", "a")])
    assert caught.value.where == "reward_service"
    assert what in caught.value.what


async def test_the_http_client_names_a_service_that_is_not_there() -> None:
    with pytest.raises(RewardError, match=r"^reward_service: http://127\.0\.0\.1:9/v1/rewards: ConnectError"):
        await HttpRewardClient("http://127.0.0.1:9", None, 5.0).score([ScoreRequest("x", "p", "a")])
