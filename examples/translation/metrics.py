"""Metrics of translation: how close translations are to their references."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from examples.text_metrics import Reference, corpus_chrf, listed


def evaluate(prompts: Sequence[str], responses: Sequence[str], *, references: Sequence[Reference]) -> dict[str, float]:
    """Return the corpus chrF (0 to 100), and the shares that equal a reference, exactly and up to word order."""
    right = [[reference.split() for reference in listed(each)] for each in references]
    found = [response.split() for response in responses]
    in_any_order = (
        sorted(" ".join(words).strip(".").split()) in [sorted(" ".join(r).strip(".").split()) for r in each]
        for words, each in zip(found, right, strict=True)
    )
    return {
        "chrf": corpus_chrf(responses, references),
        "exact": fmean(words in each for words, each in zip(found, right, strict=True)),
        "right_words": fmean(in_any_order),
    }
