from __future__ import annotations

import asyncio
import pickle
from collections.abc import Sequence
from typing import Any

import httpx
import pytest

from cluster.errors import BatchFailed, RewardError, RewardUnavailable
from cluster.scoring import Score, ScoreRequest
from reward_service.client import http, retrying
from reward_service.client.handle import HandleRewardClient
from reward_service.client.http import HttpRewardClient
from reward_service.client.retrying import RetryingRewardClient
from reward_service.client.run import NoClient, PerTaskClient, run_client
from reward_service.config.service import RewardServiceConfig
from tests.support.building import scores_of

ITEM = ScoreRequest("x", "p", "a")
GOOD = {"rewards": [{"id": "x", "reward": 2.0, "parts": {"n": 2.0}, "error": None}], "model_version": "v"}


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (http, retrying):
        monkeypatch.setattr(module, "PAUSE_S", 0.001)


def answering(*answers: Any) -> tuple[HttpRewardClient, list[httpx.Request]]:
    """Return a client whose service gives these answers in turn, the last one repeatedly, and its requests."""
    received: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        next_answer = answers[min(len(received), len(answers) - 1)]
        received.append(request)
        if isinstance(next_answer, Exception):
            raise next_answer
        status, body = next_answer
        return httpx.Response(status, text=body) if isinstance(body, str) else httpx.Response(status, json=body)

    client = HttpRewardClient("http://service", None, 5.0)
    client._client = httpx.AsyncClient(transport=httpx.MockTransport(answer))
    return client, received


@pytest.mark.parametrize(
    ("body", "what"),
    [
        ("no json", "JSONDecodeError"),
        ([], "did not answer a list of 1 rewards"),
        ({"rewards": [], "model_version": "v"}, "did not answer a list of 1 rewards"),
        ({"rewards": [{"id": "y", "reward": 1.0}], "model_version": "v"}, "an answer for 'y' instead of x"),
        ({"rewards": [{"id": "x", "reward": "1"}], "model_version": "v"}, "'1' for x, not a number"),
        ({"rewards": [{"id": "x", "reward": True}], "model_version": "v"}, "True for x, not a number"),
        ({"rewards": [{"id": "x", "reward": None}], "model_version": "v"}, "None for x, not a number"),
        ('{"rewards": [{"id": "x", "reward": NaN}], "model_version": "v"}', "nan for x, not a finite"),
        ({"rewards": [{"id": "x", "reward": 1.0, "parts": {"a": "b"}}], "model_version": "v"}, "parts for x"),
        (
            '{"rewards": [{"id": "x", "reward": 1.0, "parts": {"\\ud800": 1.0}}], "model_version": "v"}',
            "parts for x",
        ),
    ],
)
async def test_invalid_answer_is_never_used_as_a_reward(body: Any, what: str) -> None:
    client, asked = answering((200, body))
    with pytest.raises(RewardUnavailable) as caught:
        await scores_of(client, [ITEM])
    assert caught.value.where == "reward_service"
    assert what in caught.value.what
    assert len(asked) == 1


@pytest.mark.parametrize("trouble", [(503, "busy"), (429, "later"), (500, "oh"), httpx.ConnectError("refused")])
async def test_temporary_failure_is_retried(trouble: Any) -> None:
    client, asked = answering(trouble, trouble, (200, GOOD))
    assert await scores_of(client, [ITEM]) == [Score("x", 2.0, {"n": 2.0}, "v")]
    assert [request.content for request in asked] == [asked[0].content] * 3
    with pytest.raises(RewardUnavailable):
        await scores_of(answering(trouble)[0], [ITEM])


@pytest.mark.parametrize("status", [400, 401, 404, 413, 422])
async def test_rejected_call_is_not_retried(status: int) -> None:
    client, asked = answering((status, "no"), (200, GOOD))
    with pytest.raises(RewardError, match=rf"answered {status}: no") as caught:
        await scores_of(client, [ITEM])
    assert not isinstance(caught.value, RewardUnavailable)
    assert len(asked) == 1


async def test_error_of_one_item_is_final_and_names_it() -> None:
    body = {"rewards": [{"id": "x", "reward": None, "error": "length: too long"}], "model_version": "v"}
    with pytest.raises(RewardError, match="no reward for x: length: too long") as caught:
        await scores_of(answering((200, body))[0], [ITEM])
    assert not isinstance(caught.value, RewardUnavailable)


async def test_columns_are_sent_by_name() -> None:
    client, asked = answering((200, GOOD))
    await scores_of(client, [ScoreRequest("x", "p", "a", {"references": ["r"], "level": 3})])
    assert b'"columns":{"level":[3],"references":[["r"]]}' in asked[0].content


async def test_unreachable_service_is_named() -> None:
    with pytest.raises(RewardUnavailable, match=r"^reward_service: http://127\.0\.0\.1:9/v1/rewards: ConnectError"):
        await scores_of(HttpRewardClient("http://127.0.0.1:9", None, 5.0), [ITEM])


class Transport:
    """A transport without connections."""

    async def aclose(self) -> None: ...


class Moody(Transport):
    """A transport that is unavailable for `num_bad` calls, then scores."""

    def __init__(self, num_bad: int, retry_after_s: float | None = None) -> None:
        self.num_bad = num_bad
        self.retry_after_s = retry_after_s
        self.tried = asyncio.Event()

    async def outcomes(self, requests: Sequence[ScoreRequest]) -> list[Score | RewardError]:
        self.num_bad -= 1
        if self.num_bad >= 0:
            self.tried.set()
            raise RewardUnavailable("reward_service", "down", self.retry_after_s)
        return [Score(request.id, 1.0, {}, "v") for request in requests]


async def test_waiting_names_the_missing_rewards_until_the_service_is_back() -> None:
    moody = Moody(6)
    patient = RetryingRewardClient(moody, patience_s=60.0)
    assert patient.waiting() is None
    scoring = asyncio.create_task(patient.score([ITEM, ScoreRequest("y", "p", "b")]))
    await moody.tried.wait()
    assert patient.waiting() == "2 rewards (x to y): down"
    assert [score.id for score in await scoring] == ["x", "y"]
    assert patient.waiting() is None


async def test_error_names_the_missing_rewards_when_patience_ends() -> None:
    with pytest.raises(RewardUnavailable, match=r"no rewards for x in 0\.01 s \(reward_service\.patience_s\): down"):
        await RetryingRewardClient(Moody(1000), patience_s=0.01).score([ITEM])


async def test_last_retry_is_made_when_patience_ends() -> None:
    moody = Moody(1, retry_after_s=60.0)
    assert [score.id for score in await RetryingRewardClient(moody, patience_s=0.05).score([ITEM])] == ["x"]


@pytest.mark.parametrize(
    "body",
    [
        {"rewards": [{"id": "x", "reward": 10**400}], "model_version": "v"},
        {"rewards": [{"id": "x", "reward": 1.0}], "model_version": 7},
        {"rewards": [{"id": "y", "reward": None, "error": "no"}], "model_version": "v"},
        {"rewards": [{"id": "x", "reward": None, "error": "busy", "unavailable": True}], "model_version": "v"},
        "[" * 100_000,
    ],
)
async def test_any_invalid_answer_is_retryable(body: Any) -> None:
    with pytest.raises(RewardUnavailable):
        await scores_of(answering((200, body))[0], [ITEM])


async def test_column_that_json_cannot_represent_is_named() -> None:
    with pytest.raises(RewardError, match="the column level can't be sent as JSON"):
        await scores_of(answering((200, GOOD))[0], [ScoreRequest("x", "p", "a", {"level": float("nan")})])


async def test_final_error_is_not_retried() -> None:
    class Final(Transport):
        async def outcomes(self, requests: Sequence[ScoreRequest]) -> list[Score | RewardError]:
            raise RewardError("scorer", "broken")

    with pytest.raises(RewardError, match="scorer: broken"):
        await RetryingRewardClient(Final(), patience_s=60.0).score([ITEM])


async def test_requests_that_failed_together_are_scored_one_by_one() -> None:
    calls: list[list[str]] = []

    class Picky(Transport):
        async def outcomes(self, requests: Sequence[ScoreRequest]) -> list[Score | RewardError]:
            calls.append([request.id for request in requests])
            if any(request.response == "bad" for request in requests):
                error = BatchFailed if len(requests) > 1 else RewardError
                return [error("f", f"raised ValueError (scoring {request.id})") for request in requests]
            return [Score(request.id, 1.0, {}, "v") for request in requests]

    items = [ScoreRequest(id, "p", "bad" if id == "b" else "good") for id in "abc"]
    with pytest.raises(RewardError, match=r"^f: raised ValueError \(scoring b\)"):
        await RetryingRewardClient(Picky(), patience_s=60.0).score(items)
    assert calls == [["a", "b", "c"], ["a"], ["b"]]


async def test_call_is_retried_only_if_an_item_is_unavailable() -> None:
    answers: list[list[Score | RewardError]] = [
        [RewardUnavailable("reward_service", "busy"), Score("y", 1.0, {}, "v")],
        [RewardError("scorer", "no JSON"), Score("y", 2.0, {}, "v")],
    ]

    class Mixed(Transport):
        async def outcomes(self, requests: Sequence[ScoreRequest]) -> list[Score | RewardError]:
            return answers.pop(0)

    first, second = await RetryingRewardClient(Mixed(), patience_s=60.0).outcomes([ITEM, ScoreRequest("y", "p", "b")])
    assert (str(first), second) == ("scorer: no JSON", Score("y", 2.0, {}, "v"))
    assert not answers


def test_run_client_uses_a_handle_or_http_and_can_be_pickled() -> None:
    own = run_client(RewardServiceConfig(), "run", None)
    elsewhere = run_client(RewardServiceConfig(url="http://other:1", scorer="quality"), "run", "secret")
    for patient, kind in ((own, HandleRewardClient), (elsewhere, HttpRewardClient)):
        copy = pickle.loads(pickle.dumps(patient))  # noqa: S301
        assert isinstance(copy._transport, kind)
    assert elsewhere._transport._body([ITEM])["scorer"] == "quality"  # type: ignore[attr-defined]


class Named:
    """Returns the length of its name as the reward, or raises; records the ids of its requests."""

    def __init__(self, name: str, error: RewardError | None = None) -> None:
        self.name, self.error = name, error
        self.asked: list[list[str]] = []
        self.is_closed = False

    async def outcomes(self, requests: Sequence[ScoreRequest]) -> list[Score | RewardError]:
        self.asked.append([request.id for request in requests])
        if self.error is not None:
            raise self.error
        return [Score(request.id, float(len(self.name)), {}, self.name) for request in requests]

    async def aclose(self) -> None:
        self.is_closed = True


def requests_of(*tasks: str) -> list[ScoreRequest]:
    return [ScoreRequest(str(place), "p", "r", {}, task) for place, task in enumerate(tasks)]


async def test_outcomes_of_several_tasks_keep_the_order_of_requests() -> None:
    sums, games = Named("a"), Named("bb")
    clients = PerTaskClient({"sums": sums, "games": games})
    outcomes = await clients.outcomes(requests_of("games", "sums", "games"))
    assert [(outcome.id, outcome.reward) for outcome in outcomes] == [("0", 2.0), ("1", 1.0), ("2", 2.0)]  # type: ignore[union-attr]
    assert (sums.asked, games.asked) == ([["1"]], [["0", "2"]])
    await clients.outcomes(requests_of("sums"))
    assert len(games.asked) == 1
    await clients.aclose()
    assert sums.is_closed
    assert games.is_closed


async def test_call_without_requests_reaches_every_tasks_client() -> None:
    broken = Named("a", RewardUnavailable("reward_service", "down"))
    with pytest.raises(RewardUnavailable, match="down"):
        await PerTaskClient({"sums": Named("b"), "games": broken}).outcomes([])
    with pytest.raises(RewardError, match="0 is of task 'chess', which has no scorer"):
        await PerTaskClient({"sums": Named("b")}).outcomes(requests_of("chess"))


def test_client_of_several_tasks_requests_each_tasks_scorer() -> None:
    scorers = {"sums": "answer", "games": "none", "texts": "reward_model"}
    own = RewardServiceConfig().serving(list(scorers.values()))
    assert own.scorer == "reward_model"
    for config, kind in ((own, HandleRewardClient), (RewardServiceConfig(url="http://other:1"), HttpRewardClient)):
        patient = pickle.loads(pickle.dumps(run_client(config, "run", "secret", scorers)))  # noqa: S301
        clients = patient._transport._clients
        assert isinstance(clients["games"], NoClient)
        assert isinstance(clients["sums"], kind)
        assert (clients["sums"]._scorer, clients["texts"]._scorer) == ("answer", None)
