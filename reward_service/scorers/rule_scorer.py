"""Scorers that are rules: each item is scored separately, from its texts and columns alone.

A rule is a function of one item that returns its reward and the measures behind it, or raises RewardError for an item
that can't be scored. A rule that may not terminate runs in a child process (`sandbox.worker`).
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import inspect
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from numbers import Real
from pathlib import Path
from typing import Any, TypeVar

import regex

from cluster.config import Section
from cluster.errors import RewardError
from cluster.scoring import Outcome, Score, ScoreRequest
from reward_service.config.scorers import settings_text
from reward_service.scorers.scorer import Builder, Kind, Scorer, digest_of, register_kind

S = TypeVar("S", bound=Section)
T = TypeVar("T")
Verdict = tuple[float, Mapping[str, float]]
Rule = Callable[[ScoreRequest], Verdict]
MakeRule = Callable[[S], Rule]
PATTERN_TIMEOUT_S = 1.0


class RuleScorer:
    """Scores items by a rule, in threads, so that the event loop is never blocked.

    Parts are the reward under the scorer's name and the rule's measures. With several threads, items are scored
    concurrently. `on_close` releases what the rule holds.
    """

    def __init__(
        self, name: str, rule: Rule, *, version: str, num_threads: int = 1, on_close: Callable[[], None] | None = None
    ) -> None:
        self.name = name
        self.version = version
        self._rule = rule
        self._num_threads = num_threads
        self._on_close = on_close
        self._threads = ThreadPoolExecutor(max_workers=num_threads, thread_name_prefix=f"rule-{name}")

    async def score(self, requests: Sequence[ScoreRequest]) -> list[Outcome]:
        """Return one outcome per request, in order."""
        loop = asyncio.get_running_loop()
        if self._num_threads == 1:
            return await loop.run_in_executor(self._threads, lambda: [self._score_item(each) for each in requests])
        calls = [loop.run_in_executor(self._threads, self._score_item, request) for request in requests]
        return list(await asyncio.gather(*calls))

    def close(self) -> None:
        """Let the threads end after their current calls, and call `on_close`; ends the use of `score`."""
        self._threads.shutdown(wait=False)
        if self._on_close is not None:
            self._on_close()

    def _score_item(self, request: ScoreRequest) -> Outcome:
        try:
            reward, measures = self._rule(request)
        except RewardError as error:
            return RewardError(self.name, error.what)
        except Exception as error:  # noqa: BLE001 texts are untrusted input: any failure of a rule is the item's outcome
            return RewardError(self.name, f"raised {type(error).__name__}: {error} (scoring {request.id})")
        return Score(request.id, reward, {**measures, self.name: reward}, self.version)


def rule_kind(
    settings: type[S], *, libraries: Sequence[str] = ("regex",), sources: Sequence[Path] = ()
) -> Callable[[MakeRule[S]], MakeRule[S]]:
    """Register the decorated function, which makes a rule from `settings`, as a scorer kind.

    The scorer's version includes the versions of the distributions `libraries` and the contents of `sources`, the
    other source files that the rule uses.
    """

    def register(make_rule: MakeRule[S]) -> MakeRule[S]:
        source = Path(inspect.getfile(make_rule))

        def build(name: str, config: S, builder: Builder) -> Scorer:
            version = rule_version(name, config, source, *sources, libraries=libraries)
            return RuleScorer(name, make_rule(config), version=version)

        register_kind(settings, Kind(build))
        return make_rule

    return register


def rule_version(name: str, config: Section, *contents: str | Path, libraries: Sequence[str] = ("regex",)) -> str:
    """Return the name and a digest of settings, libraries, this file and `contents`.

    `contents` are texts and the source files of the rule.
    """
    versions = [f"{library} {importlib.metadata.version(library)}" for library in libraries]
    return f"{name}@{digest_of(settings_text(config), *versions, Path(__file__), *contents)}"


def references_of(request: ScoreRequest, column: str = "references") -> list[Any]:
    """Return the item's acceptable answers, at least one: texts, numbers or truth values.

    Raises RewardError if the data has none or something else.
    """
    value = request.columns.get(column)
    references = list(value) if isinstance(value, list | tuple) else [value]
    if value is None or not references:
        raise RewardError(column, f"{request.id} has no {column}")
    for reference in references:
        if not isinstance(reference, str | Real | Decimal) or reference != reference:
            shown = f"{type(reference).__name__} {repr(reference)[:60]}"
            raise RewardError(column, f"one of {request.id} is {shown}, neither text nor a number")
    return references


def last_match(pattern: regex.Pattern, text: str, item: str) -> Any:
    """Return the first group (or all) of the pattern's last match in the text, or None without a match.

    A text on which matching takes PATTERN_TIMEOUT_S has none. Raises RewardError as `in_time` does.
    """

    def find() -> deque[Any]:
        return deque(pattern.finditer(text, timeout=PATTERN_TIMEOUT_S), maxlen=1)

    last = in_time(find, PATTERN_TIMEOUT_S, item)
    return last[0][1 if pattern.groups else 0] if last else None


def in_time(match: Callable[[], T], timeout_s: float, item: str) -> T | None:
    """Return the result of a pattern's match, or None if it raised TimeoutError because of its text.

    Raises RewardError naming the item if this thread got less than half of the time as CPU time: then the machine is
    the cause.
    """
    started_s = time.thread_time()
    try:
        return match()
    except TimeoutError:
        if time.thread_time() - started_s < timeout_s / 2:
            what = f"took longer than {timeout_s:g} s on {item}, on a machine without free CPU time"
            raise RewardError("pattern", what) from None
        return None
