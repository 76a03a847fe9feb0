"""How near translations are to their references."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from examples.text_metrics import Reference, corpus_chrf, listed


def evaluate(prompts: Sequence[str], responses: Sequence[str], *, references: Sequence[Reference]) -> dict[str, float]:
    """chrF of the corpus (0 to 100); the shares that are a reference word by word, and up to the order of words."""
    right = [[reference.split() for reference in listed(each)] for each in references]
    said = [response.split() for response in responses]
    in_any_order = (
        sorted(" ".join(words).strip(".").split()) in [sorted(" ".join(r).strip(".").split()) for r in each]
        for words, each in zip(said, right, strict=True)
    )
    return {
        "chrf": corpus_chrf(responses, references),
        "exact": fmean(words in each for words, each in zip(said, right, strict=True)),
        "right_words": fmean(in_any_order),
    }
