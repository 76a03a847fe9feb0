"""Agreement between annotators: raw agreement and Cohen's kappa, as pure functions of labels."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean


@dataclass(frozen=True, slots=True)
class Agreement:
    """Agreement of two annotators on the items that both labelled; `kappa` is None if it is undefined."""

    annotators: tuple[str, str]
    num_items: int
    raw: float
    kappa: float | None


def raw_agreement(first: Sequence[str], second: Sequence[str]) -> float:
    """Return the share of items with the same label; both lists have one label per item, in order."""
    return sum(a == b for a, b in zip(first, second, strict=True)) / len(first)


def cohens_kappa(first: Sequence[str], second: Sequence[str]) -> float | None:
    """Return kappa = (p_o - p_e) / (1 - p_e), or None if p_e is 1.

    p_o is the raw agreement, and p_e = sum_k p1(k) p2(k) the agreement expected by chance from each annotator's shares
    of the labels k. p_e is 1 if both always gave the same single label.

    Source: J. Cohen, A Coefficient of Agreement for Nominal Scales, Educational and Psychological Measurement 20 (1),
    1960. Computed in integers up to the division, so perfect agreement is exactly 1.
    """
    num_items = len(first)
    num_same = sum(a == b for a, b in zip(first, second, strict=True))
    first_counts, second_counts = Counter(first), Counter(second)
    by_chance = sum(count * second_counts[label] for label, count in first_counts.items())
    beyond_chance = num_items**2 - by_chance
    return (num_same * num_items - by_chance) / beyond_chance if beyond_chance else None


def agreements(labels: Iterable[tuple[str, str, str]]) -> list[Agreement]:
    """Return the agreement of every two annotators that share an item.

    `labels` are (annotator, item, label), with one label per annotator and item.
    """
    by_item: dict[str, dict[str, str]] = defaultdict(dict)
    for annotator, item, label in labels:
        by_item[item][annotator] = label
    shared: dict[tuple[str, str], list[tuple[str, str]]] = defaultdict(list)
    for labels_of_item in by_item.values():
        for first, second in combinations(sorted(labels_of_item), 2):
            shared[first, second].append((labels_of_item[first], labels_of_item[second]))
    return [_agreement(annotators, both) for annotators, both in sorted(shared.items())]


def _agreement(annotators: tuple[str, str], both: Sequence[tuple[str, str]]) -> Agreement:
    first, second = [a for a, _ in both], [b for _, b in both]
    return Agreement(annotators, len(both), raw_agreement(first, second), cohens_kappa(first, second))


def mean_agreement(all_agreements: Sequence[Agreement]) -> tuple[float, float | None]:
    """Return the mean raw agreement and the mean kappa over all pairs of annotators.

    Source of the mean kappa: R. J. Light, Measures of Response Agreement for Qualitative Data, Psychological Bulletin
    76 (5), 1971. Undefined kappas are left out; None if all are undefined.
    """
    kappas = [agreement.kappa for agreement in all_agreements if agreement.kappa is not None]
    return fmean(agreement.raw for agreement in all_agreements), fmean(kappas) if kappas else None
