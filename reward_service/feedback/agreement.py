"""How far annotators agree: raw agreement and Cohen's kappa. Pure functions over labels; knows no store."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean


@dataclass(frozen=True, slots=True)
class Agreement:
    """Of two annotators, over the items that both labelled; `kappa` is None where it is not defined."""

    annotators: tuple[str, str]
    num_items: int
    raw: float
    kappa: float | None


def raw_agreement(first: Sequence[str], second: Sequence[str]) -> float:
    """Share of items with the same label; one label an item from each annotator, in the same order."""
    return sum(a == b for a, b in zip(first, second, strict=True)) / len(first)


def cohens_kappa(first: Sequence[str], second: Sequence[str]) -> float | None:
    """(p_o - p_e) / (1 - p_e): p_o is the raw agreement, p_e = sum_k p1(k) p2(k) what two annotators with these shares
    of each label would reach by chance. None where p_e is 1: both gave one and the same label throughout.

    Source: J. Cohen, A Coefficient of Agreement for Nominal Scales, Educational and Psychological Measurement 20 (1),
    1960. Reckoned in whole numbers up to the division, so perfect agreement is 1 exactly.
    """
    num_items = len(first)
    num_same = sum(a == b for a, b in zip(first, second, strict=True))
    first_counts, second_counts = Counter(first), Counter(second)
    by_chance = sum(count * second_counts[label] for label, count in first_counts.items())
    beyond_chance = num_items**2 - by_chance
    return (num_same * num_items - by_chance) / beyond_chance if beyond_chance else None


def agreements(labels: Iterable[tuple[str, str, str]]) -> list[Agreement]:
    """Of every two annotators that share an item, from (annotator, item, label), one label an annotator and item."""
    by_item: dict[str, dict[str, str]] = defaultdict(dict)
    for annotator, item, label in labels:
        by_item[item][annotator] = label
    shared: dict[tuple[str, str], list[tuple[str, str]]] = defaultdict(list)
    for given in by_item.values():
        for first, second in combinations(sorted(given), 2):
            shared[first, second].append((given[first], given[second]))
    return [_agreement(annotators, both) for annotators, both in sorted(shared.items())]


def _agreement(annotators: tuple[str, str], both: Sequence[tuple[str, str]]) -> Agreement:
    first, second = [a for a, _ in both], [b for _, b in both]
    return Agreement(annotators, len(both), raw_agreement(first, second), cohens_kappa(first, second))


def mean_agreement(all_agreements: Sequence[Agreement]) -> tuple[float, float | None]:
    """Mean raw agreement and mean kappa over every two annotators, each two counted once.

    Source of the mean kappa: R. J. Light, Measures of Response Agreement for Qualitative Data, Psychological Bulletin
    76 (5), 1971; undefined kappas are left out, and without any it is None.
    """
    kappas = [agreement.kappa for agreement in all_agreements if agreement.kappa is not None]
    return fmean(agreement.raw for agreement in all_agreements), fmean(kappas) if kappas else None
