"""The labelling page in a real headless Chromium, against a real store."""

from __future__ import annotations

import asyncio
import shutil
import socket
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI

from reward_service.feedback.routes import feedback_router
from reward_service.feedback.schemas import CandidatePair
from reward_service.feedback.selection import FeedbackSettings
from reward_service.feedback.store import FeedbackStore
from reward_service.http.errors import add_error_handlers

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright (pip install playwright)")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="needs a browser: apt-get install chromium"),
    pytest.mark.process,
]
NUM_PAIRS = 6
SENT = "() => !Object.keys(localStorage).some((key) => key.startsWith('antiphon.outbox.'))"
CHANGED = (
    "(old) => !document.getElementById('view-pair').hidden && document.getElementById('first').textContent !== old"
)


@dataclass
class Service:
    """A labelling service on a free port."""

    url: str
    store: FeedbackStore

    def add_pairs(self, *texts: tuple[str, str, str]) -> None:
        """Add candidate pairs of (prompt, first, second), to be asked in this order."""
        pairs = [
            CandidatePair(id=f"p{i}", prompt=prompt, first=first, second=second)
            for i, (prompt, first, second) in enumerate(texts)
        ]
        thread = threading.Thread(target=lambda: asyncio.run(self.store.add_pairs(pairs)))
        thread.start()
        thread.join()

    def labels(self) -> list[tuple[str, str, str]]:
        """Return (annotator, the better response or the choice, prompt) of all active feedback, oldest first."""
        with closing(sqlite3.connect(self.store.path)) as connection:
            return connection.execute(
                "SELECT annotator, CASE choice WHEN 'first' THEN first WHEN 'second' THEN second ELSE choice END, "
                "prompt FROM active ORDER BY position"
            ).fetchall()

    def num_stored(self) -> int:
        """Return the number of stored feedback rows, including undone ones."""
        with closing(sqlite3.connect(self.store.path)) as connection:
            return int(connection.execute("SELECT count(*) FROM feedback").fetchone()[0])


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    store = FeedbackStore(tmp_path / "feedback.sqlite")
    app = FastAPI()
    app.include_router(feedback_router(store, settings=FeedbackSettings(random_share=0)))
    add_error_handlers(app)
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        yield Service(f"http://127.0.0.1:{listening.getsockname()[1]}/label", store)
        server.should_exit = True
        thread.join()
    store.close()


@pytest.fixture
def pairs(service: Service) -> Service:
    service.add_pairs(*((f"prompt {i}", f"left {i}", f"right {i}") for i in range(NUM_PAIRS)))
    return service


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield launched
        launched.close()


@pytest.fixture
def context(browser: Any) -> Iterator[Any]:
    made = browser.new_context(viewport={"width": 1280, "height": 800})
    made.set_default_timeout(20_000)
    faults: list[str] = []
    made.on("weberror", lambda error: faults.append(str(error.error)))
    made.on("console", lambda message: faults.append(message.text) if "Security Policy" in message.text else None)
    yield made
    made.close()
    assert faults == []


@pytest.fixture
def label(context: Any, pairs: Service) -> Any:
    """Return a page that shows Ann her first pair."""
    page = context.new_page()
    page.goto(pairs.url)
    introduce(page, "Ann")
    return page


def introduce(page: Any, name: str) -> None:
    """Type a name into the focused field."""
    page.keyboard.insert_text(name)
    page.keyboard.press("Enter")
    page.locator("#view-pair").wait_for()


def shown(page: Any) -> tuple[str, str, str]:
    return tuple(page.locator(f"#{id}").text_content() for id in ("prompt", "first", "second"))  # type: ignore[return-value]


def then_next(page: Any, act: Callable[[], None]) -> tuple[str, str, str]:
    """Call `act` and wait for another pair; returns the previous pair."""
    before = shown(page)
    act()
    page.wait_for_function(CHANGED, arg=before[1])
    return before


def test_pairs_are_labelled_by_keyboard(label: Any, pairs: Service) -> None:
    expected = []
    for key, place in (("1", 1), ("ArrowLeft", 1), ("2", 2), ("ArrowRight", 2)):
        before = then_next(label, partial(label.keyboard.press, key))
        expected.append(("Ann", before[place], before[0]))
    before = then_next(label, lambda: label.keyboard.press("t"))
    expected.append(("Ann", "tie", before[0]))
    expected.append(("Ann", "skip", shown(label)[0]))
    label.keyboard.press("s")
    sync_api.expect(label.locator("#view-done")).to_contain_text("All pairs are labelled")
    sync_api.expect(label.locator("#count")).to_have_text("6 of 6 labelled")
    label.wait_for_function(SENT)
    assert pairs.labels() == expected


def test_pairs_are_labelled_by_clicks(label: Any, pairs: Service) -> None:
    first = then_next(label, label.get_by_role("button", name="1 is better").click)
    second = then_next(label, label.get_by_role("button", name="2 is better").click)
    third = then_next(label, label.get_by_role("button", name="Tie").click)
    fourth = then_next(label, label.get_by_role("button", name="Skip").click)
    label.wait_for_function(SENT)
    wanted = [("Ann", first[1], first[0]), ("Ann", second[2], second[0])]
    assert pairs.labels() == [*wanted, ("Ann", "tie", third[0]), ("Ann", "skip", fourth[0])]


def test_undo_brings_the_pair_back_and_the_new_choice_counts(label: Any, pairs: Service) -> None:
    first = then_next(label, lambda: label.keyboard.press("1"))
    then_next(label, lambda: label.keyboard.press("u"))
    assert shown(label) == first
    sync_api.expect(label.locator("#count")).to_have_text("0 of 6 labelled")
    then_next(label, lambda: label.keyboard.press("2"))
    label.wait_for_function(SENT)
    assert pairs.labels() == [("Ann", first[2], first[0])]
    assert pairs.num_stored() == 2


def test_last_choice_can_be_undone_after_a_reload(label: Any, pairs: Service) -> None:
    first = then_next(label, lambda: label.keyboard.press("1"))
    label.wait_for_function(SENT)
    label.reload()
    label.locator("#view-pair").wait_for()
    then_next(label, label.get_by_role("button", name="Undo").click)
    assert shown(label) == first
    label.wait_for_function(SENT)
    assert pairs.labels() == []


def test_the_name_is_asked_once_and_can_be_changed(label: Any, pairs: Service) -> None:
    label.reload()
    label.locator("#view-pair").wait_for()
    label.get_by_role("button", name="You are Ann; change the name").click()
    label.locator("#name").fill("Bob")
    label.keyboard.press("Enter")
    label.locator("#view-pair").wait_for()
    then_next(label, lambda: label.keyboard.press("t"))
    label.wait_for_function(SENT)
    assert [annotator for annotator, _, _ in pairs.labels()] == ["Bob"]


def test_held_key_labels_one_pair(label: Any, pairs: Service) -> None:
    def hold() -> None:
        for _ in range(10):
            label.keyboard.down("1")
        label.keyboard.up("1")

    then_next(label, hold)
    label.wait_for_function(SENT)
    assert pairs.num_stored() == 1


def test_no_choice_is_accepted_while_help_is_open(label: Any, pairs: Service) -> None:
    before = shown(label)
    label.keyboard.press("?")
    sync_api.expect(label.get_by_role("dialog", name="How to label")).to_be_visible()
    label.keyboard.press("1")
    label.keyboard.press("Escape")
    sync_api.expect(label.locator("#help")).to_be_hidden()
    assert shown(label) == before
    then_next(label, lambda: label.keyboard.press("0"))
    label.wait_for_function(SENT)
    assert pairs.labels() == [("Ann", "tie", before[0])]


def test_page_fits_a_phone_screen(browser: Any, service: Service) -> None:
    service.add_pairs(("word" * 200, "long" * 500, "wide " * 500))
    context = browser.new_context(viewport={"width": 360, "height": 640}, is_mobile=True, color_scheme="dark")
    page = context.new_page()
    page.goto(service.url)
    introduce(page, "W" * 60)
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    assert page.evaluate("innerWidth") == 360
    boxes = [page.locator(f"#card-{place}").bounding_box() for place in ("first", "second")]
    assert boxes[1]["y"] >= boxes[0]["y"] + boxes[0]["height"]
    for name in ("1 is better", "Tie", "2 is better", "Skip", "Undo", "Help"):
        box = page.get_by_role("button", name=name).bounding_box()
        assert box["height"] >= 44
        assert box["y"] + box["height"] <= 640
        assert 0 <= box["x"] <= box["x"] + box["width"] <= 360
    context.close()


def test_hostile_responses_are_shown_as_text(context: Any, service: Service) -> None:
    hostile = (
        "<script>window.hacked = 1</script>",
        "<img src=x onerror='window.hacked = 1'>",
        "</div><svg onload='window.hacked = 1'><a href='javascript:alert(1)'>x</a>{{7*7}}",
    )
    service.add_pairs(hostile, ("p", "a", "b"))
    page = context.new_page()
    page.goto(service.url)
    introduce(page, "<b onmouseover=alert(1)>Ann</b>")
    assert set(shown(page)) == set(hostile)
    assert page.locator("main").locator("script, img, svg, a, b").count() == 0
    then_next(page, lambda: page.keyboard.press("1"))
    assert page.evaluate("window.hacked") is None
    page.wait_for_function(SENT)
    assert service.labels()[0][0] == "<b onmouseover=alert(1)>Ann</b>"


def test_choice_without_connection_is_kept_and_sent_once(label: Any, context: Any, pairs: Service) -> None:
    label.wait_for_load_state("networkidle")
    context.set_offline(True)
    first = then_next(label, lambda: label.keyboard.press("1"))
    sync_api.expect(label.get_by_role("status")).to_contain_text("1 choice waits to be sent: kept in this browser")
    label.keyboard.press("2")
    sync_api.expect(label.locator("#view-trouble")).to_contain_text("The service can’t be reached")
    assert pairs.num_stored() == 0
    context.set_offline(False)
    label.locator("#view-pair").wait_for()
    label.wait_for_function(SENT)
    sync_api.expect(label.get_by_role("status")).to_be_hidden()
    sync_api.expect(label.locator("#count")).to_have_text("2 of 6 labelled")
    assert pairs.labels()[0] == ("Ann", first[1], first[0])
    assert (len(pairs.labels()), pairs.num_stored()) == (2, 2)


def test_unsent_choice_is_sent_by_the_next_page_after_a_close(label: Any, context: Any, pairs: Service) -> None:
    label.wait_for_load_state("networkidle")
    context.set_offline(True)
    first = then_next(label, lambda: label.keyboard.press("1"))
    label.close()
    context.set_offline(False)
    page = context.new_page()
    page.goto(pairs.url)
    page.locator("#view-pair").wait_for()
    page.wait_for_function(SENT)
    assert pairs.labels() == [("Ann", first[1], first[0])]


def test_choice_for_another_store_is_not_sent_to_this_one(label: Any, pairs: Service) -> None:
    waiting = {"method": "POST", "path": "v1/feedback", "body": {"id": "x", "annotator": "Ann", "pair": "q"}}
    label.evaluate("(it) => localStorage.setItem('antiphon.outbox.another.1', JSON.stringify(it))", waiting)
    label.reload()
    label.locator("#view-pair").wait_for()
    then_next(label, lambda: label.keyboard.press("1"))
    label.wait_for_function("() => Object.keys(localStorage).filter((key) => key.includes('outbox')).length === 1")
    assert len(pairs.labels()) == 1
    assert label.evaluate("localStorage.getItem('antiphon.outbox.another.1')") is not None


def test_choice_counts_once_if_its_response_was_lost(label: Any, pairs: Service) -> None:
    bodies = []

    def lose_the_first_answer(route: Any) -> None:
        bodies.append(route.request.post_data_json)
        response = route.fetch()
        if len(bodies) == 1:
            route.abort("connectionreset")
        else:
            route.fulfill(response=response)

    label.route("**/v1/feedback", lose_the_first_answer)
    first = then_next(label, lambda: label.keyboard.press("1"))
    label.wait_for_function(SENT)
    assert len(bodies) == 2
    assert bodies[0] == bodies[1]
    assert pairs.labels() == [("Ann", first[1], first[0])]
    assert pairs.num_stored() == 1


def test_rejected_choice_is_shown_and_stored_separately(label: Any, pairs: Service) -> None:
    error = {"error": {"code": "invalid", "message": "no such wish", "field": None}}
    label.route("**/v1/feedback", lambda route: route.fulfill(status=422, json=error))
    then_next(label, lambda: label.keyboard.press("1"))
    sync_api.expect(label.get_by_role("status")).to_have_text("A choice was not accepted: no such wish")
    label.wait_for_function(SENT)
    kept = label.evaluate("Object.keys(localStorage).filter((key) => key.startsWith('antiphon.refused.')).length")
    assert (kept, pairs.num_stored()) == (1, 0)


def test_agreement_with_others_is_shown(context: Any, label: Any, pairs: Service) -> None:
    for _ in range(2):
        then_next(label, lambda: label.keyboard.press("t"))
    label.wait_for_function(SENT)
    connection = sqlite3.connect(pairs.store.path)
    with closing(connection), connection:
        connection.execute(
            "INSERT INTO feedback (id, kind, annotator, time, pair, prompt, first, second, choice) "
            "SELECT 'b' || id, kind, 'Bob', time, pair, prompt, first, second, iif(pair = 'p0', 'tie', 'first') "
            "FROM feedback"
        )
    label.reload()
    sync_api.expect(label.locator("#agreement")).to_have_text("50% agreement · 2 shared")


def test_token_in_the_address_is_used_and_hidden(context: Any, pairs: Service) -> None:
    page = context.new_page()
    with page.expect_request("**/v1/pairs/next*") as asked:
        page.goto(f"{pairs.url}#token=secret")
        introduce(page, "Ann")
    assert asked.value.headers["authorization"] == "Bearer secret"
    assert page.url == pairs.url
    page.reload()
    page.locator("#view-pair").wait_for()
    with page.expect_request("**/v1/feedback") as sent:
        page.keyboard.press("1")
    assert sent.value.headers["authorization"] == "Bearer secret"


def test_page_without_pairs_can_look_again(context: Any, service: Service) -> None:
    page = context.new_page()
    page.goto(service.url)
    page.keyboard.type("Ann")
    page.keyboard.press("Enter")
    sync_api.expect(page.locator("#view-done")).to_be_visible()
    service.add_pairs(("p", "a", "b"))
    page.get_by_role("button", name="Look again").click()
    page.locator("#view-pair").wait_for()
