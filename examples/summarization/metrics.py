"""Metrics of summarization: closeness to the sentences with figures, and length."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from examples.summarization.data import LIMIT_WORDS
from examples.text_metrics import Reference, rouge_l


def evaluate(prompts: Sequence[str], responses: Sequence[str], *, references: Sequence[Reference]) -> dict[str, float]:
    """Return ROUGE-L (0 to 1), mean length in words, and the shares within the limit and of sentences in the report."""
    lengths = [len(response.split()) for response in responses]
    faithful = [
        sentence in prompt
        for prompt, response in zip(prompts, responses, strict=True)
        for sentence in filter(None, (part.strip() for part in response.split(".")))
    ]
    return {
        "rouge_l": rouge_l(responses, references),
        "num_words": fmean(lengths),
        "within_limit": fmean(length <= LIMIT_WORDS for length in lengths),
        "faithful": fmean(faithful or [False]),
    }
