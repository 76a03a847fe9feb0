"""The HTTP routes of human feedback and the labelling page: a FastAPI router around a FeedbackStore.

The guard puts the name of the request's token, if any, into `scope["state"]["token_name"]`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from typing import Annotated

import pyarrow as pa
import pyarrow.parquet as pq
from fastapi import APIRouter, Path, Query, Request, Response
from fastapi.concurrency import run_in_threadpool

from cluster.errors import FeedbackConflict, FeedbackRefused, FeedbackUnavailable, FeedbackUnknown
from reward_service.feedback.schemas import (
    MAX_EXCEPTED,
    Annotator,
    Feedback,
    Id,
    NextPair,
    PairsAdded,
    PairsRequest,
    Receipt,
    Summary,
)
from reward_service.feedback.selection import FeedbackSettings
from reward_service.feedback.store import FeedbackStore
from reward_service.http.app import StrictRoute
from reward_service.http.errors import documented, refusal

PAGE = "page.html"
FILES = {
    PAGE: "text/html",
    "page.css": "text/css",
    "page.js": "text/javascript",
    "outbox.js": "text/javascript",
    "icon.svg": "image/svg+xml",
}
SAFE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
PARQUET = "application/vnd.apache.parquet"
RETRY_AFTER_S = 5


@contextmanager
def _refused() -> Iterator[None]:
    """Turn the store's exceptions into HTTP errors."""
    try:
        yield
    except FeedbackUnavailable as error:
        raise refusal(503, str(error), retry_after_s=RETRY_AFTER_S) from error
    except FeedbackRefused as error:
        status = 404 if isinstance(error, FeedbackUnknown) else 409 if isinstance(error, FeedbackConflict) else 422
        raise refusal(status, error.what, error.where) from error


def _token_name(request: Request) -> str | None:
    return getattr(request.state, "token_name", None)


def feedback_router(store: FeedbackStore, *, settings: FeedbackSettings) -> APIRouter:
    """Return the routes of `store`; `settings` decide which pairs annotators are asked about."""
    router = APIRouter(route_class=StrictRoute)
    _add_reading_routes(router, store)  # before {id}, which would match their paths
    _add_feedback_routes(router, store)
    _add_pair_routes(router, store, settings)
    _add_page(router)
    return router


def _add_feedback_routes(router: APIRouter, store: FeedbackStore) -> None:
    @router.post("/v1/feedback", responses=documented(409, 422))
    async def give_feedback(body: Feedback, request: Request) -> Receipt:
        """Store a preference, a rating or a correction; sending it again changes nothing."""
        with _refused():
            return await store.add(body, token=_token_name(request))

    @router.delete("/v1/feedback/{id}", responses=documented(404, 409, 422))
    async def undo_feedback(
        id: Annotated[Id, Path()], annotator: Annotated[Annotator, Query()], request: Request
    ) -> Receipt:
        """Undo feedback of the annotator; it no longer counts but stays as history."""
        with _refused():
            return await store.retract(id, annotator=annotator, token=_token_name(request))


def _add_pair_routes(router: APIRouter, store: FeedbackStore, settings: FeedbackSettings) -> None:
    @router.get("/v1/pairs/next", responses=documented(422))
    async def next_pair(
        annotator: Annotated[Annotator, Query()],
        excepted: Annotated[list[Id], Query(alias="except", max_length=MAX_EXCEPTED)] = [],  # noqa: B006
    ) -> NextPair:
        """The pair to ask the annotator about next, null if there is none; `except` names pairs to leave out."""
        with _refused():
            return await store.next_pair(annotator, settings, excepted=excepted)

    @router.post("/v1/pairs", responses=documented(409, 422))
    async def add_pairs(body: PairsRequest) -> PairsAdded:
        """Add candidate pairs; of known ones only the reward model's opinion is updated."""
        with _refused():
            return await store.add_pairs(body.pairs)


def _add_reading_routes(router: APIRouter, store: FeedbackStore) -> None:
    @router.get("/v1/feedback/summary", responses=documented())
    async def summary() -> Summary:
        """Counts of feedback per annotator, and the agreement of annotators."""
        with _refused():
            return await store.summary()

    @router.get(
        "/v1/feedback/export",
        response_class=Response,
        responses={200: {"content": {PARQUET: {}}, "description": "A Parquet file"}, **documented()},
    )
    async def export() -> Response:
        """All preferences as Parquet: prompt, chosen and rejected, then annotator, policy and time."""
        with _refused():
            table = await store.preferences()
        headers = {"Content-Disposition": 'attachment; filename="preferences.parquet"', "Cache-Control": "no-store"}
        return Response(await run_in_threadpool(_parquet, table), media_type=PARQUET, headers=headers)


def _parquet(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    content: bytes = sink.getvalue().to_pybytes()
    return content


def _add_page(router: APIRouter) -> None:
    folder = files("reward_service") / "feedback" / "page"
    contents = {name: (folder / name).read_bytes() for name in FILES}

    @router.get("/label", response_class=Response, responses={200: {"content": {FILES[PAGE]: {}}}, **documented()})
    async def page() -> Response:
        """The labelling page."""
        return Response(contents[PAGE], media_type=FILES[PAGE], headers=SAFE_HEADERS)

    @router.get(
        "/label/{name}",
        response_class=Response,
        responses={200: {"content": {kind: {} for kind in sorted(set(FILES.values()))}}, **documented(404)},
    )
    async def page_file(name: str) -> Response:
        """A file of the labelling page."""
        if name not in contents or name == PAGE:
            raise refusal(404, f"the labelling page has no file {name!r}", "name")
        return Response(contents[name], media_type=FILES[name], headers=SAFE_HEADERS)
