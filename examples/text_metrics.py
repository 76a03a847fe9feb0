"""Compute chrF and ROUGE-L with sacrebleu and rouge-score (the extra `examples`), which are imported on first use."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from statistics import fmean
from types import ModuleType
from typing import Any

from cluster.errors import InputError

Reference = str | Sequence[str]
"""One or several right texts."""


def sentence_chrf(responses: Sequence[str], references: Sequence[Reference]) -> list[float]:
    """Return chrF (Popovic 2015) of each response, 0 to 100, with the best of its references."""
    score = _chrf().sentence_score
    return [float(score(text, listed(right)).score) for text, right in zip(responses, references, strict=True)]


def corpus_chrf(responses: Sequence[str], references: Sequence[Reference]) -> float:
    """Return chrF of all responses together, 0 to 100. Only the first of several references is used."""
    return float(_chrf().corpus_score(list(responses), [[listed(right)[0] for right in references]]).score)


def rouge_l(responses: Sequence[str], references: Sequence[Reference]) -> float:
    """Return the mean F-measure of ROUGE-L (Lin 2004), 0 to 1, with the best of each response's references."""
    scorer = _rouge()
    best = (
        max(scorer.score(reference, text)["rougeL"].fmeasure for reference in listed(right))
        for text, right in zip(responses, references, strict=True)
    )
    return fmean(best)


def listed(reference: Reference) -> list[str]:
    """Return the references as a list."""
    return [reference] if isinstance(reference, str) else list(reference)


@functools.cache
def _chrf() -> Any:
    return _package("sacrebleu", "sacrebleu.metrics").CHRF()


@functools.cache
def _rouge() -> Any:
    return _package("rouge-score", "rouge_score.rouge_scorer").RougeScorer(["rougeL"])


def _package(name: str, module: str) -> ModuleType:
    """Import a module of an optional package. Raises InputError that names the package if it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(name, f"is not installed: pip install 'antiphon[examples]' ({error})") from error
