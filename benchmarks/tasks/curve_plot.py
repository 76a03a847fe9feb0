"""Draws the README's learning curve from `benchmarks/results/lag_study.json`: `python -m benchmarks.tasks.curve_plot`.

One line for each bound on the policy lag: the median of the seeds, with their range as a band. Two files, for a light
and for a dark page. Every number comes from the results.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib

from benchmarks.results import ROOT, Row, read

matplotlib.use("svg")
FOLDER = ROOT / "docs" / "assets"
CURVE = re.compile(r"lag (\d+)(?:, decoupled)?: curve, seed \d+")
TOTAL = re.compile(r"last tenth of ([\d,]+) episodes")


class Theme(NamedTuple):
    """Colors of one picture: text and axes, and a line for each curve."""

    text: str
    lines: Sequence[str]


THEMES = {
    "learning_curve.svg": Theme("#1f2328", ("#0a6ebd", "#9a4b00", "#6639ba", "#1a6f33")),
    "learning_curve_dark.svg": Theme("#e6edf3", ("#58a6ff", "#f0883e", "#bc8cff", "#56d364")),
}


class Curve(NamedTuple):
    """One bound on the lag: the reward of each part of the run, as median, lowest and highest of the seeds."""

    lag: int
    num_seeds: int
    median: Sequence[float]
    lowest: Sequence[float]
    highest: Sequence[float]


def curves(rows: Sequence[Row]) -> list[Curve]:
    """Returns the curves of decoupled PPO, sorted by lag. Lag 0 is synchronous PPO."""
    by_lag: dict[int, list[tuple[float, ...]]] = {}
    for row in rows:
        if match := CURVE.fullmatch(row.figure):
            by_lag.setdefault(int(match[1]), []).append(row.values)
    return [_curve(lag, by_lag[lag]) for lag in sorted(by_lag)]


def _curve(lag: int, seeds: Sequence[Sequence[float]]) -> Curve:
    points = list(zip(*seeds, strict=True))
    return Curve(
        lag, len(seeds), [statistics.median(p) for p in points], [min(p) for p in points], [max(p) for p in points]
    )


def num_episodes(rows: Sequence[Row]) -> int:
    """Returns the number of responses that each run was trained on, read from the names of the rows."""
    found = {match[1] for row in rows if (match := TOTAL.search(row.figure))}
    (total,) = found
    return int(total.replace(",", ""))


def draw(path: Path, theme: Theme) -> None:
    """Writes one picture with a transparent background."""
    from matplotlib import pyplot

    _, rows = read("lag_study")
    found, total = curves(rows), num_episodes(rows)
    pyplot.rcParams.update({"svg.hashsalt": "antiphon", "svg.fonttype": "none", "font.family": "sans-serif"})
    pyplot.rcParams.update(dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor"), theme.text))
    pyplot.rcParams.update(dict.fromkeys(("xtick.color", "ytick.color"), theme.text))
    figure, axes = pyplot.subplots(figsize=(8, 3.6))
    for curve, color in zip(found, theme.lines, strict=True):
        width = total / len(curve.median)
        episodes = [(point + 0.5) * width for point in range(len(curve.median))]
        axes.fill_between(episodes, curve.lowest, curve.highest, color=color, alpha=0.18, linewidth=0)
        axes.plot(episodes, curve.median, color=color, label=f"max_policy_lag = {curve.lag}")
    axes.set(xlabel="responses trained", ylabel="mean reward", ylim=(0, 1.02), xlim=(0, total))
    axes.set_title(f"letters: median and range of {found[0].num_seeds} seeds")
    axes.grid(alpha=0.25)
    axes.legend(loc="lower right", frameon=False)
    figure.tight_layout()
    figure.savefig(path, transparent=True, metadata={"Date": None})
    pyplot.close(figure)


def draw_all() -> None:
    """Writes the picture for a light page and for a dark page."""
    for name, theme in THEMES.items():
        draw(FOLDER / name, theme)


if __name__ == "__main__":
    draw_all()
