"""Reward of a translation: its chrF with the reference, 0 to 1."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from examples.text_metrics import Reference, sentence_chrf


def translation_reward(
    prompts: Sequence[str], responses: Sequence[str], *, references: Sequence[Reference], **columns: Any
) -> list[float]:
    """Return one reward per response. chrF compares characters, so a wrong ending costs less than a wrong word."""
    return [score / 100 for score in sentence_chrf(responses, references)]
