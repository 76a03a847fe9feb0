"""Rules that need neither a child process nor a file. Each function makes the rule of its settings.

What a rule measures beside the reward is `MEASURES` of its settings class.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from decimal import Decimal
from itertools import product
from pathlib import Path
from typing import Any

import regex

from cluster.errors import InputError, RewardError
from cluster.scoring import ScoreRequest
from reward_service.config.scorers import (
    ExactConfig,
    LanguageConfig,
    LengthConfig,
    NumericConfig,
    RegexConfig,
    RepetitionConfig,
    TruncationConfig,
)
from reward_service.parsing import numbers
from reward_service.parsing.numbers import NUMBER, Number, read_number
from reward_service.scorers.rule_scorer import Rule, Verdict, in_time, last_match, references_of, rule_kind


@rule_kind(ExactConfig)
def exact_rule(config: ExactConfig) -> Rule:
    """1 if the answer is one of the references, else 0. Texts are compared in Unicode's composed form (NFC)."""
    pattern = regex.compile(config.answer) if config.answer else None

    def normalized(text: str) -> str:
        text = unicodedata.normalize("NFC", text.strip() if config.strip else text)
        return unicodedata.normalize("NFC", text.casefold()) if config.ignore_case else text

    def rule(request: ScoreRequest) -> Verdict:
        references = references_of(request)
        answer = last_match(pattern, request.response, request.id) if pattern else request.response
        accepted = {normalized(text) for reference in references for text in spellings(reference)}
        is_right = answer is not None and normalized(answer) in accepted
        return float(is_right), {"found": float(answer is not None)}

    return rule


def spellings(reference: Any) -> list[str]:
    """Return the texts that equal a reference: a column of whole numbers may hold 5.0, one of truth values True."""
    if isinstance(reference, bool):
        return [str(reference), str(reference).lower()]
    is_whole = isinstance(reference, float | Decimal) and math.isfinite(reference) and reference == int(reference)
    return [str(reference), str(int(reference))] if is_whole else [str(reference)]


@rule_kind(NumericConfig, sources=(Path(numbers.__file__),))
def numeric_rule(config: NumericConfig) -> Rule:
    """1 if the answer is within the tolerance of a reference, else 0. Numbers are read as in `numbers`."""
    pattern = regex.compile(config.answer or f"({NUMBER})")

    def is_equal(answer: Number, number: Number | None, request: ScoreRequest) -> bool:
        if number is None:
            raise RewardError("references", f"a reference of {request.id} is not a finite number")
        pairs = product(answer.readings(number), number.readings(answer))
        return any(abs(a - b) <= max(config.tolerance, config.relative_tolerance * abs(b)) for a, b in pairs)

    def rule(request: ScoreRequest) -> Verdict:
        expected = [read_number(reference) for reference in references_of(request)]
        answer = read_number(last_match(pattern, request.response, request.id))
        if answer is None:
            return 0.0, {"found": 0.0}
        is_right = any(is_equal(answer, number, request) for number in expected)
        return float(is_right), {"found": 1.0, "answer": answer.value}

    return rule


@rule_kind(RegexConfig)
def regex_rule(config: RegexConfig) -> Rule:
    """`reward` if the response matches the pattern, else `otherwise`."""
    pattern = regex.compile(config.pattern)
    matches = pattern.fullmatch if config.match == "full" else pattern.search

    def rule(request: ScoreRequest) -> Verdict:
        match = in_time(lambda: matches(request.response, timeout=config.timeout_s), config.timeout_s, request.id)
        matched = match is not None
        return (config.reward if matched else config.otherwise), {"matched": float(matched)}

    return rule


@rule_kind(LengthConfig)
def length_rule(config: LengthConfig) -> Rule:
    """0 within the bounds, minus the penalty beyond them."""

    def rule(request: ScoreRequest) -> Verdict:
        length = len(units(request.response, config.unit))
        beyond = max(config.min - length, 0 if config.max is None else length - config.max, 0)
        share = min(1.0, beyond / config.margin) if config.margin else float(beyond > 0)
        return 0.0 - config.penalty * share, {f"num_{config.unit}": float(length)}

    return rule


def units(text: str, unit: str) -> Sequence[str]:
    """Return the text's words or characters."""
    return text.split() if unit == "words" else text


@rule_kind(TruncationConfig)
def truncation_rule(config: TruncationConfig) -> Rule:
    """0 if the response is complete, minus the penalty if it was cut off."""
    endings = tuple(config.endings)

    def rule(request: ScoreRequest) -> Verdict:
        reason = request.columns.get("finish_reason")
        cut_off = reason == "length" if reason is not None else not request.response.rstrip().endswith(endings)
        return 0.0 - config.penalty * cut_off, {"cut_off": float(cut_off)}

    return rule


@rule_kind(RepetitionConfig)
def repetition_rule(config: RepetitionConfig) -> Rule:
    """Minus the penalty times the share of repeated n-grams."""

    def rule(request: ScoreRequest) -> Verdict:
        parts = units(request.response, config.unit)
        grams = [tuple(parts[start : start + config.n]) for start in range(len(parts) - config.n + 1)]
        share = 1 - len(set(grams)) / len(grams) if grams else 0.0
        return 0.0 - config.penalty * share, {"repeated_share": share}

    return rule


@rule_kind(LanguageConfig, libraries=("py3langid",))
def language_rule(config: LanguageConfig) -> Rule:
    """1 if py3langid detects the expected language, else 0.

    Raises InputError for a language it does not support.
    """
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
