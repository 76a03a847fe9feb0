"""A judge with a small real HTTP server whose answers each test sets."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from cluster.errors import InputError, RewardError
from cluster.scoring import Score, ScoreRequest
from reward_service.config.scorers import JudgeConfig
from reward_service.scorers import judge
from reward_service.scorers.judge import JudgeScorer

ITEM = ScoreRequest("i", "what is 1+1?", "it is 2", {"references": "2"})


class Endpoint:
    """An OpenAI-compatible endpoint that gives its answers in turn (the last one repeatedly) and records requests."""

    def __init__(self) -> None:
        self.answers: list[tuple[int, Any, dict[str, str]]] = []
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.paths: list[str] = []
        self.under_way = self.most_under_way = 0
        self.gate: threading.Barrier | None = None
        self.silent = threading.Event()
        self.lock = threading.Lock()
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                endpoint.answer(self)

            def log_message(self, *arguments: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def say(self, content: Any) -> None:
        self.answers.append((200, {"choices": [{"message": {"content": content}}]}, {}))

    def refuse(self, status: int, **headers: str) -> None:
        self.answers.append((status, {"error": "busy"}, {key.replace("_", "-"): headers[key] for key in headers}))

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["content-length"])))
        with self.lock:
            self.asked.append(body)
            self.keys.append(handler.headers["authorization"])
            self.paths.append(handler.path)
            self.under_way += 1
            self.most_under_way = max(self.most_under_way, self.under_way)
            status, content, headers = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if self.gate is not None:
            self.gate.wait(10)
        if content is None:
            self.silent.wait(10)
        with self.lock:
            self.under_way -= 1
        text = content if isinstance(content, str) else json.dumps(content)
        with contextlib.suppress(ConnectionError):
            self.send(handler, status, headers, text)

    def send(self, handler: BaseHTTPRequestHandler, status: int, headers: dict[str, str], text: str) -> None:
        handler.send_response(status)
        for key, value in headers.items():
            handler.send_header(key, value)
        handler.send_header("content-length", str(len(text)))
        handler.end_headers()
        handler.wfile.write(text.encode())


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    monkeypatch.setattr(judge, "FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(judge._backoff, "multiplier", 0.001)
    endpoint = Endpoint()
    thread = threading.Thread(target=endpoint.server.serve_forever, args=(0.01,))
    thread.start()
    yield endpoint
    endpoint.silent.set()
    endpoint.server.shutdown()
    endpoint.server.server_close()
    thread.join()


async def ask(endpoint: Endpoint | str, *items: ScoreRequest, **settings: Any) -> Any:
    url = endpoint if isinstance(endpoint, str) else endpoint.url
    given = {"kind": "judge", "url": url, "model": "m", "rubric": "{prompt}|{response}", "timeout_s": 10.0} | settings
    scorer = JudgeScorer("helpful", JudgeConfig.model_validate(given))
    try:
        outcomes = await scorer.score(items or [ITEM])
    finally:
        await scorer.aclose()
    return outcomes if len(items) > 1 else outcomes[0]


async def test_rubric_is_sent_with_the_items_texts_at_temperature_0(endpoint: Endpoint) -> None:
    endpoint.say("Good. Score: 7")
    rubric = "Asked {prompt} answered {response}, expected {reference}. {other} {0} {{x}}"
    score = await ask(endpoint, rubric=rubric, system="You judge.", max_tokens=9)
    assert score == Score("i", 7.0, {"opinion": 7.0, "helpful": 7.0}, score.scorer_version)
    assert endpoint.paths == ["/v1/chat/completions"]
    filled = "Asked what is 1+1? answered it is 2, expected 2. {other} {0} {{x}}"
    assert endpoint.asked == [
        {
            "model": "m",
            "messages": [{"role": "system", "content": "You judge."}, {"role": "user", "content": filled}],
            "temperature": 0.0,
            "max_tokens": 9,
        }
    ]


async def test_placeholders_inside_a_response_are_left_alone(endpoint: Endpoint) -> None:
    endpoint.say("score: 1")
    item = ScoreRequest("i", "p {response}", "{reference} {prompt} {x} %s \\1", {"references": "secret"})
    await ask(endpoint, item, rubric="{prompt}|{response}")
    assert endpoint.asked[0]["messages"][0]["content"] == "p {response}|{reference} {prompt} {x} %s \\1"


@pytest.mark.parametrize(
    ("settings", "opinion", "reward"),
    [
        ({}, "score: 3", 3.0),
        ({}, "Score 1? No: SCORE = -2.5.", -2.5),
        ({}, "**Score: 8**/10", 8.0),
        ({}, "on a scale of 1 to 10: 7", 7.0),
        ({"pattern": r"\[\[(\d+)\]\]"}, "[[4]] out of 9", 4.0),
        ({"pattern": r"\d+"}, "7 of 10", 10.0),
        ({"low": 1, "high": 5}, "score: 5", 1.0),
        ({"low": 1, "high": 5}, "score: 2", 0.25),
        ({"json_field": "grade"}, '{"grade": 2.5, "why": "score: 9"}', 2.5),
        ({"json_field": "grade"}, 'So:\n```json\n{"grade": "3"}\n```', 3.0),
    ],
)
async def test_the_number_is_read_and_scaled(
    endpoint: Endpoint, settings: dict[str, Any], opinion: str, reward: float
) -> None:
    endpoint.say(opinion)
    assert (await ask(endpoint, **settings)).reward == reward


@pytest.mark.parametrize(
    ("settings", "opinion", "what"),
    [
        ({}, "I'd rather not", 'no number in its answer: "I\'d rather not" (scoring i)'),
        ({}, "", "no number in its answer: '' (scoring i)"),
        ({"json_field": "grade"}, "[1]", "no number in its answer: '[1]'"),
        ({"json_field": "grade"}, '{"score": 1}', "no number in its answer"),
        ({"json_field": "grade"}, '{"grade": NaN}', "no number in its answer"),
        ({"json_field": "grade"}, '{"grade": true}', "no number in its answer"),
        ({"json_field": "grade"}, "[" * 100_000, "no number in its answer"),
        ({"low": 0, "high": 10}, "score: 11", "11 is not within 0 to 10: 'score: 11'"),
    ],
)
async def test_error_quotes_the_answer_if_it_has_no_valid_number(
    endpoint: Endpoint, settings: dict[str, Any], opinion: str, what: str
) -> None:
    endpoint.say(opinion)
    outcome = await ask(endpoint, **settings)
    assert isinstance(outcome, RewardError)
    assert outcome.where == "helpful"
    assert what in outcome.what


@pytest.mark.parametrize("status", [429, 500, 503])
async def test_busy_or_failing_endpoint_is_retried(endpoint: Endpoint, status: int) -> None:
    endpoint.refuse(status)
    endpoint.refuse(status)
    endpoint.say("score: 1")
    assert (await ask(endpoint)).reward == 1.0
    assert len(endpoint.asked) == 3


@pytest.mark.parametrize("status", [400, 401, 404, 302])
async def test_rejected_request_is_not_retried(endpoint: Endpoint, status: int) -> None:
    endpoint.refuse(status)
    outcome = await ask(endpoint)
    assert f"answered {status}" in outcome.what
    assert len(endpoint.asked) == 1


async def test_error_after_max_attempts_if_the_endpoint_keeps_failing(endpoint: Endpoint) -> None:
    endpoint.refuse(503)
    outcome = await ask(endpoint, max_attempts=3)
    assert "Busy: answered 503" in outcome.what
    assert len(endpoint.asked) == 3


async def test_retry_after_is_respected_within_the_deadline(endpoint: Endpoint) -> None:
    endpoint.refuse(429, retry_after="0.05")
    endpoint.say("score: 1")
    assert (await ask(endpoint)).reward == 1.0
    endpoint.answers = []
    endpoint.refuse(429, retry_after="3600")
    outcome = await ask(endpoint)
    assert "answered 429" in outcome.what
    assert len(endpoint.asked) == 3


async def test_error_at_the_deadline_if_the_endpoint_is_silent(endpoint: Endpoint) -> None:
    endpoint.answers = [(200, None, {})]
    outcome = await ask(endpoint, timeout_s=0.1, max_attempts=1)
    assert isinstance(outcome, RewardError)
    assert "i" in outcome.what


async def test_error_names_the_endpoint_if_it_is_unreachable() -> None:
    outcome = await ask("http://127.0.0.1:9/v1", max_attempts=1)
    assert "http://127.0.0.1:9/v1: ConnectError" in outcome.what


@pytest.mark.parametrize(
    "answer", ["no json", [], {}, {"choices": []}, {"choices": [{"message": {"content": None}}]}, "[" * 100_000]
)
async def test_error_if_the_answer_is_not_a_chat_completion(endpoint: Endpoint, answer: Any) -> None:
    endpoint.answers = [(200, answer, {})]
    outcome = await ask(endpoint)
    assert isinstance(outcome, RewardError)
    assert "answered" in outcome.what


async def test_failed_item_does_not_affect_the_others(endpoint: Endpoint) -> None:
    endpoint.say("score: 1")
    good, bad = await ask(endpoint, ITEM, ScoreRequest("j", "p", "r"), rubric="{response} {reference}")
    assert isinstance(good, Score)
    assert str(bad) == "helpful: j has no references (scoring j)"


async def test_concurrent_questions_are_limited(endpoint: Endpoint) -> None:
    endpoint.say("score: 1")
    endpoint.gate = threading.Barrier(2)
    items = [ScoreRequest(str(number), "p", "r") for number in range(6)]
    outcomes = await ask(endpoint, *items, max_concurrent=2)
    assert [outcome.id for outcome in outcomes] == [item.id for item in items]
    assert endpoint.most_under_way == 2


async def test_the_key_comes_from_the_environment(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    endpoint.say("score: 1")
    monkeypatch.setenv("JUDGE_KEY", "secret")
    await ask(endpoint, api_key_variable="JUDGE_KEY")
    await ask(endpoint)
    assert endpoint.keys == ["Bearer secret", None]
    monkeypatch.delenv("JUDGE_KEY")
    with pytest.raises(InputError, match=r"^reward_service\.scorers\.helpful\.api_key_variable: JUDGE_KEY is not set"):
        await ask(endpoint, api_key_variable="JUDGE_KEY")
