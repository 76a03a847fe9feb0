"""Access control of every route of the whole app."""

from __future__ import annotations

import base64
import re
from pathlib import Path

import httpx

from reward_service.feedback.routes import feedback_router
from reward_service.feedback.selection import FeedbackSettings
from reward_service.feedback.store import FeedbackStore
from reward_service.http.tokens import add_token, revoke_token
from tests.reward_service.http.test_contracts import client_of

OPEN = {"GET /healthz"}


def all_routes(client: httpx.AsyncClient) -> set[str]:
    """Return method and path of every route of the app, with an `x` for each parameter."""
    app = client._transport.app._app  # type: ignore[attr-defined]
    return {f"{method} {re.sub('{.*?}', 'x', route.path)}" for route in app.routes for method in route.methods}


async def test_every_route_requires_the_right_token(tmp_path: Path) -> None:
    path = tmp_path / "tokens.json"
    named, revoked = add_token(path, "named"), add_token(path, "revoked")
    store = FeedbackStore(tmp_path / "feedback.sqlite")
    client = client_of(token="secret", tokens=path, routers=[feedback_router(store, settings=FeedbackSettings())])
    revoke_token(path, "revoked")
    routes = all_routes(client)
    assert {*OPEN, "GET /metrics", "POST /v1/rewards", "DELETE /v1/feedback/x", "GET /label/x"} <= routes
    for route in sorted({*routes, "GET /nowhere"}):
        method, where = route.split()
        for good, headers in (
            (False, {}),
            (False, {"Authorization": "Bearer wrong"}),
            (False, {"Authorization": f"Bearer {revoked}"}),
            (True, {"Authorization": "Bearer secret"}),
            (True, {"Authorization": f"Bearer {named}"}),
            (True, {"Authorization": "Basic " + base64.b64encode(f"antiphon:{named}".encode()).decode()}),
        ):
            status = (await client.request(method, where, headers=headers)).status_code
            assert (status != 401) == (good or route in OPEN), (route, headers, status)
    store.close()
