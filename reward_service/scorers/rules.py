"""Scorers that are rules: each item judged by itself, from its texts and columns alone.

A rule is a function of one item that answers with its reward and the measures it follows from, or raises RewardError
for an item that can't be judged. Knows no model and no transport; what may not end by itself runs in `worker`.
"""

from __future__ import annotations

import asyncio
import math
import unicodedata
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import regex

from cluster.errors import InputError, RewardError
from cluster.scoring import Outcome, Score, ScoreRequest
from reward_service.config.scorers import (
    ExactConfig,
    LanguageConfig,
    LengthConfig,
    NumericConfig,
    RegexConfig,
    RepetitionConfig,
    TruncationConfig,
)

Verdict = tuple[float, Mapping[str, float]]
Rule = Callable[[ScoreRequest], Verdict]
PATTERN_TIMEOUT_S = 1.0
VIOLATION = "violation"
"""The part that is 1 where something forbidden was found, and 0 elsewhere: what a bound on violations is a bound of."""
NUMBER = r"[-+]?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?"


class RuleScorer:
    """Judges items by a rule, in threads, so that the service goes on meanwhile.

    Parts are the reward under the scorer's name and the rule's measures. With several threads items are judged at the
    same time; `on_close` lets go of what the rule holds.
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
        loop = asyncio.get_running_loop()
        if self._num_threads == 1:
            return await loop.run_in_executor(self._threads, lambda: [self._judge(request) for request in requests])
        calls = [loop.run_in_executor(self._threads, self._judge, request) for request in requests]
        return list(await asyncio.gather(*calls))

    def close(self) -> None:
        """Let the threads end after what they are asked, and let go of what the rule holds; nothing asks afterwards."""
        self._threads.shutdown(wait=False)
        if self._on_close is not None:
            self._on_close()

    def _judge(self, request: ScoreRequest) -> Outcome:
        try:
            reward, measures = self._rule(request)
        except RewardError as error:
            return RewardError(self.name, error.what)
        except Exception as error:  # noqa: BLE001 the item's texts are anyone's: what a rule can't do is its outcome
            return RewardError(self.name, f"raised {type(error).__name__}: {error} (scoring {request.id})")
        return Score(request.id, reward, {**measures, self.name: reward}, self.version)


def references_of(request: ScoreRequest, column: str = "references") -> list[Any]:
    """The item's acceptable answers, at least one. Raises RewardError where the data has none."""
    references = request.columns.get(column)
    if references is None or (isinstance(references, list | tuple) and not references):
        raise RewardError(column, f"{request.id} has no {column}")
    return list(references) if isinstance(references, list | tuple) else [references]


def last_match(pattern: regex.Pattern, text: str, item: str) -> Any:
    """The pattern's last match in the text: its first group, or all of it; None without one.

    Raises RewardError naming the item when it takes longer than PATTERN_TIMEOUT_S.
    """
    try:
        last = deque(pattern.finditer(text, timeout=PATTERN_TIMEOUT_S), maxlen=1)
    except TimeoutError:
        raise RewardError("pattern", f"took longer than {PATTERN_TIMEOUT_S:g} s on {item}") from None
    return last[0][1 if pattern.groups else 0] if last else None


def exact_rule(config: ExactConfig) -> Rule:
    pattern = regex.compile(config.answer) if config.answer else None

    def plain(text: Any) -> str:
        shown = str(text).strip() if config.strip else str(text)
        return shown.casefold() if config.ignore_case else shown

    def rule(request: ScoreRequest) -> Verdict:
        references = references_of(request)
        answer = last_match(pattern, request.response, request.id) if pattern else request.response
        return float(answer is not None and plain(answer) in map(plain, references)), {
            "found": float(answer is not None)
        }

    return rule


def numeric_rule(config: NumericConfig) -> Rule:
    pattern = regex.compile(config.answer or f"({NUMBER})")

    def equal(answer: float, number: float | None, request: ScoreRequest) -> bool:
        if number is None:
            raise RewardError("references", f"a reference of {request.id} is no finite number")
        return abs(answer - number) <= max(config.tolerance, config.relative_tolerance * abs(number))

    def rule(request: ScoreRequest) -> Verdict:
        expected = [number_of(reference) for reference in references_of(request)]
        answer = number_of(last_match(pattern, request.response, request.id))
        if answer is None:
            return 0.0, {"found": 0.0}
        return float(any(equal(answer, number, request) for number in expected)), {"found": 1.0, "answer": answer}

    return rule


def number_of(value: Any) -> float | None:
    """A finite number that the value is or writes, thousands' commas and all; None for anything else."""
    try:
        number = float(value.replace(",", "")) if isinstance(value, str) else float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) and not isinstance(value, bool) else None


def regex_rule(config: RegexConfig) -> Rule:
    pattern = regex.compile(config.pattern)
    matches = pattern.fullmatch if config.match == "full" else pattern.search

    def rule(request: ScoreRequest) -> Verdict:
        try:
            matched = matches(request.response, timeout=config.timeout_s) is not None
        except TimeoutError:
            raise RewardError("pattern", f"took longer than {config.timeout_s:g} s on {request.id}") from None
        return (config.reward if matched else config.otherwise), {"matched": float(matched)}

    return rule


def length_rule(config: LengthConfig) -> Rule:
    def rule(request: ScoreRequest) -> Verdict:
        length = len(units(request.response, config.unit))
        beyond = max(config.min - length, 0 if config.max is None else length - config.max, 0)
        share = min(1.0, beyond / config.margin) if config.margin else float(beyond > 0)
        return 0.0 - config.penalty * share, {f"num_{config.unit}": float(length)}

    return rule


def units(text: str, unit: str) -> Sequence[str]:
    """The text's words or characters."""
    return text.split() if unit == "words" else text


def truncation_rule(config: TruncationConfig) -> Rule:
    endings = tuple(config.endings)

    def rule(request: ScoreRequest) -> Verdict:
        reason = request.columns.get("finish_reason")
        cut_off = reason == "length" if reason is not None else not request.response.rstrip().endswith(endings)
        return 0.0 - config.penalty * cut_off, {"cut_off": float(cut_off)}

    return rule


def repetition_rule(config: RepetitionConfig) -> Rule:
    def rule(request: ScoreRequest) -> Verdict:
        parts = units(request.response, config.unit)
        grams = [tuple(parts[start : start + config.n]) for start in range(len(parts) - config.n + 1)]
        share = 1 - len(set(grams)) / len(grams) if grams else 0.0
        return 0.0 - config.penalty * share, {"repeated_share": share}

    return rule


def language_rule(config: LanguageConfig) -> Rule:
    """Raises InputError for a language that py3langid does not know."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    unknown = {config.language, *config.among} - set(identifier.labels)
    if unknown:
        raise InputError("language", f"py3langid does not know {', '.join(sorted(unknown))}")
    if config.among:
        identifier.set_languages(config.among)

    def rule(request: ScoreRequest) -> Verdict:
        if not any(map(str.isalpha, request.response)):
            return 0.0, {"probability": 0.0}
        ranked = identifier.rank(request.response)
        return float(ranked[0][0] == config.language), {"probability": float(dict(ranked)[config.language])}

    return rule


def forbidden_rule(phrases: Sequence[str], turns: Literal["all", "last"] = "all") -> Rule:
    """1 where none of the phrases is in the response, or in any that the conversation has, as whole words."""
    wanted = sorted({bare(phrase) for phrase in phrases} - {""}, key=lambda phrase: (-len(phrase), phrase))
    pattern = regex.compile(rf"(?<!\w)(?:{'|'.join(map(regex.escape, wanted))})(?!\w)") if wanted else None

    def rule(request: ScoreRequest) -> Verdict:
        texts = said(request) if turns == "all" else [request.response]
        num = len({found for text in texts for found in pattern.findall(bare(text))}) if pattern else 0
        return float(num == 0), {"num_forbidden": float(num), VIOLATION: float(num > 0)}

    return rule


def said(request: ScoreRequest) -> list[str]:
    """All that the policy said: the response and, where there is a conversation, what its assistant says in it."""
    messages = request.columns.get("conversation") or ()
    return [*(message["content"] for message in messages if message["role"] == "assistant"), request.response]


def bare(text: str) -> str:
    """The text as it is compared: compatibility forms unified, no invisible characters, lower case, single spaces."""
    text = unicodedata.normalize("NFKC", text)
    visible = "".join(character for character in text if unicodedata.category(character) != "Cf")
    return " ".join(unicodedata.normalize("NFKC", visible.casefold()).split())
