"""The kind `forbidden`: 1 if a response has nothing forbidden, by phrases and by a user's function."""

from __future__ import annotations

import asyncio
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import regex

from cluster.errors import BatchFailed, NotApplicable, RewardError
from cluster.scoring import Outcome, Score, ScoreRequest
from reward_service.config.scorers import ForbiddenConfig
from reward_service.functions.process import check_path
from reward_service.scorers.files import read_phrases
from reward_service.scorers.function import FunctionScorer
from reward_service.scorers.rule_scorer import Rule, RuleScorer, Verdict, rule_version
from reward_service.scorers.scorer import Builder, Kind, Scorer, digest_of, register_kind, setting_key

VIOLATION = "violation"
"""The part that is 1 if something forbidden was found, else 0; `learner.constraint` bounds its mean."""


def forbidden_rule(phrases: Sequence[str], turns: Literal["all", "last"] = "all") -> Rule:
    """1 if none of the phrases is in the response or the policy's other turns, else 0."""
    wanted = sorted({comparable(phrase) for phrase in phrases} - {""}, key=lambda phrase: (-len(phrase), phrase))
    pattern = regex.compile(rf"(?<!\w)(?:{'|'.join(map(regex.escape, wanted))})(?!\w)") if wanted else None

    def rule(request: ScoreRequest) -> Verdict:
        texts = policy_texts(request) if turns == "all" else [request.response]
        num = len({found for text in texts for found in pattern.findall(comparable(text))}) if pattern else 0
        return float(num == 0), {"num_forbidden": float(num), VIOLATION: float(num > 0)}

    return rule


def policy_texts(request: ScoreRequest) -> list[str]:
    """Return the assistant's turns of the conversation, if there is one, and the response."""
    messages = request.columns.get("conversation") or ()
    return [*(message.get("content") or "" for message in messages if message["role"] == "assistant"), request.response]


def comparable(text: str) -> str:
    """Return the text in NFKC and lower case, without invisible characters and repeated spaces."""
    text = unicodedata.normalize("NFKC", text)
    visible = "".join(character for character in text if unicodedata.category(character) != "Cf")
    return " ".join(unicodedata.normalize("NFKC", visible.casefold()).split())


class GuardedScorer:
    """Combines the rule for phrases with a user's function: 0 if either is 0 or less, else 1."""

    def __init__(self, name: str, rule: Scorer, function: Scorer) -> None:
        self.name = name
        self.version = f"{name}@{digest_of(rule.version, function.version)}"
        self._rule = rule
        self._function = function

    async def score(self, requests: Sequence[ScoreRequest]) -> list[Outcome]:
        """Return one outcome per request, in order."""
        pairs = zip(*await asyncio.gather(self._rule.score(requests), self._function.score(requests)), strict=True)
        return [self._combined(*pair) for pair in pairs]

    def _combined(self, of_rule: Outcome, of_function: Outcome) -> Outcome:
        if not isinstance(of_rule, Score):
            return of_rule
        if isinstance(of_function, NotApplicable):
            return Score(of_rule.id, of_rule.reward, of_rule.parts, self.version)
        if not isinstance(of_function, Score):
            error = BatchFailed if isinstance(of_function, BatchFailed) else RewardError
            return error(self.name, of_function.what)
        reward = float(of_rule.reward > 0 and of_function.reward > 0)
        parts = {**of_rule.parts, **of_function.parts, VIOLATION: 1 - reward, self.name: reward}
        return Score(of_rule.id, reward, parts, self.version)

    def close(self) -> None:
        """Close the rule and the function."""
        for scorer in (self._rule, self._function):
            scorer.close()  # type: ignore[attr-defined]


def _build(name: str, config: ForbiddenConfig, builder: Builder) -> Scorer:
    phrases = read_phrases(config)
    version = rule_version(name, config, *phrases, Path(__file__))
    rule = RuleScorer(name, forbidden_rule(phrases, config.turns), version=version)
    if config.function is None:
        return rule
    key = setting_key(name, "function")
    return GuardedScorer(name, rule, FunctionScorer(config.function, config.function, key, timeout_s=builder.timeout_s))


def _check_files(name: str, config: ForbiddenConfig, folders: Mapping[str, Path]) -> None:
    read_phrases(config)


def _check_environment(name: str, config: ForbiddenConfig) -> None:
    if config.function is not None:
        check_path(config.function, setting_key(name, "function"))


register_kind(ForbiddenConfig, Kind(_build, _check_files, _check_environment))
