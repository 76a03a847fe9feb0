"""A user's function in its own process: scores, errors, deadlines, and processes that end."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import BatchFailed, InputError, RewardError
from cluster.scoring import Outcome, Score, ScoreRequest
from reward_service.functions.results import Result
from reward_service.scorers import function
from reward_service.scorers.function import FunctionScorer

pytestmark = pytest.mark.process
Make = Callable[..., FunctionScorer]


@pytest.fixture
def scorer() -> Iterator[Make]:
    """Make scorers of functions in tests.support.scorers; they are closed at the end."""
    made = []

    def make(name: str, timeout_s: float = 60.0) -> FunctionScorer:
        path = name if ":" in name else f"tests.support.scorers:{name}"
        made.append(FunctionScorer(path, path, "here", timeout_s=timeout_s))
        return made[-1]

    yield make
    for each in made:
        each.close()


def requests(*responses: str, **columns: Any) -> list[ScoreRequest]:
    return [ScoreRequest(f"7-0-{i}", "say", response, columns) for i, response in enumerate(responses)]


def rewards(outcomes: list[Outcome]) -> list[float]:
    return [outcome.reward for outcome in outcomes if isinstance(outcome, Score)]


def errors(outcomes: list[Outcome]) -> list[str | None]:
    return [str(outcome) if isinstance(outcome, RewardError) else None for outcome in outcomes]


@pytest.mark.parametrize("name", ["length", "length_async"])
async def test_a_function_scores_sync_or_async(scorer: Make, name: str) -> None:
    outcomes = await scorer(name).score(requests("a", "bbb"))
    assert rewards(outcomes) == [1.0, 3.0]
    assert [outcome.id for outcome in outcomes if isinstance(outcome, Score)] == ["7-0-0", "7-0-1"]


async def test_score_has_parts_and_the_version_of_the_source(scorer: Make) -> None:
    (score,) = await scorer("length").score(requests("a"))
    assert isinstance(score, Score)
    assert dict(score.parts) == {"length": 1.0}
    assert re.fullmatch(r"tests\.support\.scorers:length@[0-9a-f]{12}", score.scorer_version)


async def test_function_gets_only_the_columns_that_it_takes(scorer: Make) -> None:
    items = [
        ScoreRequest("0", "p", "x", {"references": "x", "topic": "tea"}),
        ScoreRequest("1", "p", "x", {"references": "y"}),
    ]
    assert rewards(await scorer("equals_reference").score(items)) == [1.0, 0.0]


async def test_every_item_of_a_call_fails_if_the_function_raises(scorer: Make) -> None:
    outcomes = await scorer("raising").score(requests("a", "b"))
    what = r"tests.support.scorers:raising: raised KeyError: 'no such answer' at tests/support/scorers.py:\d+"
    for i, outcome in enumerate(outcomes):
        assert isinstance(outcome, BatchFailed)
        assert re.fullmatch(rf"{what} \(scoring 7-0-{i}, one of 2\)", str(outcome))
    (alone,) = await scorer("raising").score(requests("a"))
    assert not isinstance(alone, BatchFailed)


async def test_every_item_fails_if_there_are_too_few_rewards(scorer: Make) -> None:
    outcomes = await scorer("too_few").score(requests("a", "b"))
    expected = "tests.support.scorers:too_few: returned 1 rewards for 2 responses (scoring 7-0-{}, one of 2)"
    assert errors(outcomes) == [expected.format(0), expected.format(1)]


async def test_error_names_the_item_if_the_value_is_not_a_list(scorer: Make) -> None:
    outcomes = await scorer("not_a_list").score(requests("a"))
    assert errors(outcomes) == ["tests.support.scorers:not_a_list: returned float, not a list (scoring 7-0-0)"]


@pytest.mark.parametrize("wrong", ["nan", "inf", "huge", "string", "none"])
async def test_value_that_is_not_finite_fails_only_its_item(scorer: Make, wrong: str) -> None:
    good, bad = await scorer("wrong_on_demand").score(requests("one", wrong))
    assert isinstance(good, Score)
    assert good.reward == 1.0
    assert isinstance(bad, RewardError)
    assert bad.where == "tests.support.scorers:wrong_on_demand"
    assert "7-0-1" in bad.what


async def test_function_is_not_called_without_requests(scorer: Make) -> None:
    assert await scorer("raising").score([]) == []


async def test_function_may_use_signals_and_event_loops_of_its_own(scorer: Make) -> None:
    assert rewards(await scorer("needs_main_thread").score(requests("a", "bb"))) == [1.0, 2.0]


async def test_math_verify_keeps_its_own_time_limit(scorer: Make) -> None:
    items = [ScoreRequest(str(i), "", text, {"solution": "$3$"}) for i, text in enumerate(["is $3$", "is $4$"])]
    assert rewards(await scorer("math_verified").score(items)) == [1.0, 0.0]


async def test_slow_sync_function_does_not_block_the_event_loop(scorer: Make, tmp_path: Path) -> None:
    call = asyncio.create_task(
        scorer("gated").score(requests("a", references=[str(tmp_path / "a"), str(tmp_path / "b")]))
    )
    while not (tmp_path / "a").exists():
        await asyncio.sleep(0.01)
    (tmp_path / "b").touch()
    assert rewards(await call) == [1.0]


async def test_hanging_call_ends_at_its_deadline_and_the_next_one_works(scorer: Make) -> None:
    hangs = scorer("hangs_on_demand", timeout_s=0.5)
    late, short = await asyncio.gather(hangs.score(requests("hang", "a")), hangs.score(requests("abc")))
    what = "tests.support.scorers:hangs_on_demand: did not return within 0.45 s (scoring 7-0-{}, one of 2)"
    assert errors(late) == [what.format(0), what.format(1)]
    assert all(isinstance(outcome, BatchFailed) for outcome in late)
    assert rewards(short) == [3.0]


async def test_hanging_async_call_does_not_end_the_others(scorer: Make) -> None:
    waits = scorer("waits_on_demand", timeout_s=0.5)
    late, short = await asyncio.gather(waits.score(requests("hang")), waits.score(requests("abc")))
    assert "did not return within 0.45 s" in str(late[0])
    assert rewards(short) == [3.0]


async def test_call_is_repeated_if_the_process_dies_once(scorer: Make, tmp_path: Path) -> None:
    mark = str(tmp_path / "died")
    assert rewards(await scorer("die_once").score(requests("abc", references=mark))) == [3.0]
    assert (tmp_path / "died").exists()


async def test_error_if_the_process_dies_again_and_again(scorer: Make) -> None:
    (outcome,) = await scorer("exits").score(requests("a"))
    assert "its process ended 3 times (exit code 7) (scoring 7-0-0)" in str(outcome)


async def test_changed_source_is_not_used_by_a_new_process(
    scorer: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    module = tmp_path / "my_scorers.py"
    source = "import os\n\ndef f(prompts, responses):\n    return [1.0 if r else os._exit(7) for r in responses]\n"
    module.write_text(source)
    function = scorer("my_scorers:f")
    assert rewards(await function.score(requests("a"))) == [1.0]
    module.write_text(source.replace("1.0", "2.00"))
    (outcome,) = await function.score(requests(""))
    assert "can't be started again" in str(outcome)
    assert "has changed: repeat the command to use the new one" in str(outcome)


def test_module_that_raises_or_exits_is_an_input_error(
    scorer: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "leaves.py").write_text("import os\nos._exit(3)\n")
    (tmp_path / "raises.py").write_text("raise OSError('no data')\n")
    with pytest.raises(InputError, match=r"^here: importing leaves:f ended its process \(exit code 3\)"):
        scorer("leaves:f")
    with pytest.raises(InputError, match=r"^here: cannot import 'raises' \(OSError: no data\)"):
        scorer("raises:f")


async def test_process_ends_with_everything_that_it_started(scorer: Make, tmp_path: Path) -> None:
    function = scorer("starts_a_process")
    (outcome,) = await function.score(requests(str(tmp_path / "pid")))
    assert isinstance(outcome, Score)
    function.close()
    pid = int((tmp_path / "pid").read_text())
    for _ in range(500):
        if not Path(f"/proc/{pid}/stat").exists() or Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z":
            return
        await asyncio.sleep(0.01)
    os.kill(pid, 9)
    raise AssertionError("it is still there")


def test_names_of_parts_hold_no_lone_surrogate() -> None:
    request, result = ScoreRequest("x", "p", "r", {}), Result(1.0, {"file \udce9": 0.5})
    score = function.outcome(request, result, name="m:reward", version="v")
    assert isinstance(score, Score)
    assert score.parts == {"file \ufffd": 0.5, "reward": 1.0}
