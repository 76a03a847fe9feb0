"""Shows the lag study as a table by bound, and draws its curves into `docs/assets/lag_study.svg`."""

from __future__ import annotations

import re
import statistics

import matplotlib

from benchmarks.results import Row, read
from benchmarks.tasks.curve_plot import FOLDER
from benchmarks.tasks.lag_study import LAGS, NUM_EPISODES, SHOWN

matplotlib.use("svg")
PLOT = FOLDER / "lag_study.svg"


def table() -> list[str]:
    """Markdown lines: the median over seeds of the last tenth's mean reward, with and without decoupling."""
    _, rows = read("lag_study")
    ends = {row.figure.partition(":")[0]: row for row in rows if "last tenth of" in row.figure}
    lines = [f"| `max_policy_lag` | {' | '.join(map(str, LAGS))} |", f"|---|{'---|' * len(LAGS)}"]
    for name in ("decoupled", "not decoupled"):
        found = [ends["lag 0" if lag == 0 else f"lag {lag}, {name}"].measured() for lag in LAGS]
        lines.append(f"| {name} | {' | '.join(found)} |")
    return lines


def draw() -> None:
    """Write the plot: a panel for each way, a line for each bound, the median of the seeds."""
    from matplotlib import pyplot

    _, rows = read("lag_study")
    pyplot.rcParams.update({"svg.hashsalt": "antiphon", "svg.fonttype": "none"})
    figure, panels = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True)
    episodes = [(point + 0.5) * NUM_EPISODES / SHOWN for point in range(SHOWN)]
    for panel, name in zip(panels, ("decoupled", "not decoupled"), strict=True):
        for lag in LAGS:
            panel.plot(episodes, _median_curve(rows, lag, name), label=f"lag {lag}")
        panel.set_title(name)
        panel.set_xlabel("episodes")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("mean reward")
    panels[0].legend()
    figure.tight_layout()
    figure.savefig(PLOT, metadata={"Date": None})


def _median_curve(rows: list[Row], lag: int, name: str) -> list[float]:
    pattern = re.compile(rf"lag {lag}{'' if lag == 0 else f', {name}'}: curve")
    curves = [row.values for row in rows if pattern.match(row.figure)]
    return [statistics.median(points) for points in zip(*curves, strict=True)]
