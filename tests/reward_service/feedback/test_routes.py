"""The feedback routes with a real store: valid and invalid requests, and the page's security headers."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fastapi import FastAPI, Request

from cluster.errors import FeedbackUnavailable
from reward_service.feedback.routes import FILES, feedback_router
from reward_service.feedback.selection import FeedbackSettings
from reward_service.feedback.store import PREFERENCES, FeedbackStore
from reward_service.http.errors import add_error_handlers

PAIR = {"id": "p1", "prompt": "p", "first": "a", "second": "b", "policy_version": "3@x"}
PREFERENCE = {
    "kind": "preference",
    "id": "x",
    "annotator": "Ann",
    "prompt": "p",
    "first": "a",
    "second": "b",
    "choice": "first",
}
RATING = {"kind": "rating", "id": "r", "annotator": "Ann", "prompt": "p", "response": "a", "score": 4}


def feedback_app(store: FeedbackStore) -> FastAPI:
    app = FastAPI()
    app.include_router(feedback_router(store, settings=FeedbackSettings(random_share=0)))
    add_error_handlers(app)
    return app


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[FeedbackStore]:
    opened = FeedbackStore(tmp_path / "feedback.sqlite")
    yield opened
    opened.close()


@pytest.fixture
def http(store: FeedbackStore) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app=feedback_app(store), raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://service")


async def test_annotator_answers_undoes_and_is_asked_again(http: httpx.AsyncClient) -> None:
    added = await http.post("/v1/pairs", json={"pairs": [PAIR]})
    assert added.json() == {"num_added": 1, "num_known": 0}
    asked = (await http.get("/v1/pairs/next", params={"annotator": "Ann"})).json()
    assert asked["progress"] == {"num_done": 0, "num_left": 1}
    assert set(asked["pair"]) == {"id", "prompt", "first", "second", "policy_version"}
    texts = {name: asked["pair"][name] for name in ("prompt", "first", "second")}
    given = await http.post("/v1/feedback", json=PREFERENCE | texts | {"pair": "p1"})
    assert given.status_code == 200
    assert given.json()["time"].endswith("Z")
    done = (await http.get("/v1/pairs/next", params={"annotator": "Ann"})).json()
    assert (done["pair"], done["progress"]) == (None, {"num_done": 1, "num_left": 0})
    assert (await http.delete("/v1/feedback/x", params={"annotator": "Ann"})).status_code == 200
    again = (await http.get("/v1/pairs/next", params={"annotator": "Ann"})).json()
    assert again == asked


async def test_excepted_pairs_are_not_asked(http: httpx.AsyncClient) -> None:
    await http.post("/v1/pairs", json={"pairs": [PAIR, PAIR | {"id": "p2"}]})
    asked = await http.get("/v1/pairs/next", params={"annotator": "Ann", "except": ["p1", "p3"]})
    assert asked.json()["pair"]["id"] == "p2"


async def test_the_name_of_the_token_is_stored_beside_the_feedback(store: FeedbackStore) -> None:
    app = feedback_app(store)

    @app.middleware("http")
    async def guard(request: Request, call_next: Any) -> Any:
        request.state.token_name = "phone"
        return await call_next(request)

    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://service") as http:
        await http.post("/v1/feedback", json=PREFERENCE)
    (row,) = await store._read(lambda: store._reading.execute("SELECT token FROM feedback").fetchall())
    assert row["token"] == "phone"


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"choice": "both"}, "preference.choice"),
        ({"second": "a"}, "preference"),
        ({"annotator": ""}, "preference.annotator"),
        ({"annotator": " Ann"}, "preference.annotator"),
        ({"annotator": "A\nB"}, "preference.annotator"),
        ({"annotator": "A" * 101}, "preference.annotator"),
        ({"id": "../x"}, "preference.id"),
        ({"id": "x" * 129}, "preference.id"),
        ({"first": "a" * 1_000_001}, "preference.first"),
        ({"first": 1}, "preference.first"),
        ({"mood": "good"}, "preference.mood"),
        ({"pair": "p9"}, "pair"),
        ({"kind": "wish"}, None),
    ],
    ids=lambda value: str(value)[:40],
)
async def test_field_of_a_wrong_preference_is_named(
    http: httpx.AsyncClient, changes: dict[str, Any], field: str | None
) -> None:
    headers = {"content-type": "application/json"}
    answer = await http.post("/v1/feedback", content=json.dumps(PREFERENCE | changes), headers=headers)
    assert answer.status_code == 422
    assert (answer.json()["error"]["code"], answer.json()["error"]["field"]) == ("invalid", field)


@pytest.mark.parametrize("changes", [{"score": 6}, {"lowest": 5, "highest": 5}, {"score": "4"}])
async def test_rating_out_of_its_range_is_rejected(http: httpx.AsyncClient, changes: dict[str, Any]) -> None:
    headers = {"content-type": "application/json"}
    answer = await http.post("/v1/feedback", content=json.dumps(RATING | changes), headers=headers)
    assert answer.status_code == 422
    assert (await http.post("/v1/feedback", json=RATING)).status_code == 200


async def test_conflicts_are_409_and_unknown_feedback_is_404(
    http: httpx.AsyncClient,
) -> None:
    await http.post("/v1/feedback", json=PREFERENCE)
    conflict = await http.post("/v1/feedback", json=PREFERENCE | {"choice": "tie"})
    assert (conflict.status_code, conflict.json()["error"]["field"]) == (409, "id")
    another = await http.delete("/v1/feedback/x", params={"annotator": "Bob"})
    assert (another.status_code, another.json()["error"]["code"]) == (409, "conflict")
    unknown = await http.delete("/v1/feedback/y", params={"annotator": "Ann"})
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "not_found")


async def test_retry_after_is_sent_if_the_store_is_unavailable(
    http: httpx.AsyncClient, store: FeedbackStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def busy(*_: Any, **__: Any) -> None:
        raise FeedbackUnavailable("feedback.sqlite", "database is locked")

    monkeypatch.setattr(store, "add", busy)
    answer = await http.post("/v1/feedback", json=PREFERENCE)
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
    assert answer.json()["error"]["message"] == "feedback.sqlite: database is locked"


async def test_the_summary_counts_each_annotator_and_their_agreement(http: httpx.AsyncClient) -> None:
    await http.post("/v1/pairs", json={"pairs": [PAIR]})
    for id, annotator in (("x", "Ann"), ("y", "Bob")):
        await http.post("/v1/feedback", json=PREFERENCE | {"id": id, "annotator": annotator, "pair": "p1"})
    await http.post("/v1/feedback", json=RATING)
    summary = (await http.get("/v1/feedback/summary")).json()
    assert (summary["num_pairs"], summary["num_pairs_labelled"]) == (1, 1)
    assert (summary["total"]["num_preferences"], summary["annotators"]["Ann"]["num_ratings"]) == (2, 1)
    assert summary["agreement"] == [{"annotators": ["Ann", "Bob"], "num_pairs": 1, "raw": 1.0, "kappa": None}]
    assert summary["mean_agreement"] == {"raw": 1.0, "kappa": None}


async def test_the_export_is_parquet_in_trl_columns(http: httpx.AsyncClient) -> None:
    await http.post("/v1/feedback", json=PREFERENCE)
    answer = await http.get("/v1/feedback/export")
    assert answer.headers["content-type"] == "application/vnd.apache.parquet"
    table = pq.read_table(pa.BufferReader(answer.content))
    assert table.schema.equals(PREFERENCES)
    assert table.slice(0, 1).to_pylist()[0]["chosen"] == "a"


async def test_page_may_load_and_run_only_its_own_files(
    http: httpx.AsyncClient,
) -> None:
    page = await http.get("/label")
    assert page.headers["content-type"].startswith("text/html")
    for name in FILES:
        answer = page if name == "page.html" else await http.get(f"/label/{name}")
        assert answer.status_code == 200
        policy = answer.headers["content-security-policy"]
        assert "default-src 'self'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
    for name in ("page.html", "__init__.py", "%2e%2e%2fconfig.py"):
        assert (await http.get(f"/label/{name}")).status_code == 404


async def test_every_route_documents_its_statuses(http: httpx.AsyncClient) -> None:
    paths = (await http.get("/openapi.json")).json()["paths"]
    named = {
        (path, method): set(route["responses"]) for path, methods in paths.items() for method, route in methods.items()
    }
    assert all({"200", "401", "503"} <= statuses for statuses in named.values())
    assert {"400", "409", "413", "422"} <= named["/v1/feedback", "post"]
    assert {"404", "409", "422"} <= named["/v1/feedback/{id}", "delete"]
    assert {"400", "409", "413", "422"} <= named["/v1/pairs", "post"]
    errors = paths["/v1/feedback"]["post"]["responses"]["422"]["content"]["application/json"]["schema"]["$ref"]
    assert errors.endswith("/ErrorResponse")
