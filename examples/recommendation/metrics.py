"""Metrics of recommendation: NDCG@5 of the rankings, and of a ranking by popularity alone."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from examples.recommendation.scorers import DISCOUNTS, NUM_PLACES, chances_of, ranked_items


def evaluate(
    prompts: Sequence[str],
    responses: Sequence[str],
    *,
    offered: Sequence[Sequence[str]],
    click_chances: Sequence[Sequence[float]],
    popularity: Sequence[Sequence[float]] | None = None,
) -> dict[str, float]:
    """Return NDCG@5 by the chance of a click (Järvelin and Kekäläinen 2002) and the share of valid rankings."""
    gains, valid = [], []
    for response, items, chances in zip(responses, offered, click_chances, strict=True):
        ranked = ranked_items(response)
        gains.append(chances_of(ranked, items, chances))
        first = ranked[:NUM_PLACES]
        valid.append(len(set(first)) == NUM_PLACES and set(first) <= {item.casefold() for item in items})
    measured = {"ndcg_5": fmean(map(ndcg, gains, click_chances)), "valid": fmean(valid)}
    if popularity is None:
        return measured
    popular = [by_popularity(chances, each) for chances, each in zip(click_chances, popularity, strict=True)]
    return measured | {"ndcg_5_popularity": fmean(map(ndcg, popular, click_chances))}


def by_popularity(chances: Sequence[float], popularity: Sequence[float]) -> list[float]:
    """Return the chances of a click in the order of popularity."""
    return [chance for _, chance in sorted(zip(popularity, chances, strict=True), reverse=True)]


def ndcg(gains: Sequence[float], possible: Sequence[float]) -> float:
    """Return the discounted gain of the first five places over that of the best five."""
    best = dcg(sorted(possible, reverse=True))
    return dcg(gains) / best if best else 0.0


def dcg(gains: Sequence[float]) -> float:
    """Return the discounted gain of the first five places."""
    return sum(discount * gain for discount, gain in zip(DISCOUNTS, gains, strict=False))
