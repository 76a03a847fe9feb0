"""Write the section of `benchmarks/README.md` on scale: a table by number of actors, and an estimate for 10,000."""

from __future__ import annotations

import math

from benchmarks.results import Row, read
from benchmarks.scale.measure import PARTS

ACTORS, ACTORS_A_NODE, TOKENS_A_TRAJECTORY = 10_000, 8, 1024
RATE = 1.0
"""Trajectories per second of one actor."""
MAX_CALLS = 1000
"""Ray's max_concurrency of an async actor."""
HEARD = " fetch 16 MiB: all have heard of it"

ON_PAPER = """\
**Estimate for {actors:,} actors.** Each actor gives {rate:g} trajectory of {size} a second, {offered:,.0f} in all.
A recorder takes {recorder:,.0f} a second ({megabytes:.0f} MB/s), so {recorders:,} recorders are needed, each with its
own log and its share of the groups; a reader of the run merges the logs by step and position. A queue that carries
tokens takes {queue:,.0f} a second, so {queues:,} would be needed. But only one queue can number the groups, so it must
hold references, and the tokens must go from the actors to the recorders and from there to the learner.
{listeners} actors are notified of a version in {heard_ms:,.0f} ms, and a Ray actor holds at most {max_calls:,} calls,
one per waiting actor, so {actors:,} cannot wait at one store. With a relay on each of {nodes:,} nodes of {a_node}
actors, {relays:,} relays above them and the store at the top, no process has more waiting calls than were measured,
and a node fetches and checks a version once, not {a_node} times."""


def section() -> list[str]:
    """Return the section as Markdown lines."""
    _, rows = read("scale")
    return [*_ring(rows), "", *_fan_out(rows), "", *on_paper(rows)]


def _ring(rows: list[Row]) -> list[str]:
    sizes = list(dict.fromkeys(row.figure.partition(":")[0] for row in rows if ": offered" in row.figure))
    by_name = {row.figure: row for row in rows}
    lines = [f"| stand-in actors | {' | '.join(sizes)} |", f"|---|{'---|' * len(sizes)}"]
    for figure in ("offered", "trained", "coordination", *PARTS, "driver", "Ray"):
        cells = [by_name[f"{size}: {figure}"] for size in sizes]
        lines.append(f"| {figure}, {cells[0].unit} | {' | '.join(f'{cell.median:,.0f}' for cell in cells)} |")
    return lines


def _fan_out(rows: list[Row]) -> list[str]:
    shown = [row for row in rows if " alone" in row.figure or " fetch " in row.figure]
    return ["| part alone | measured |", "|---|---|", *(f"| {row.figure} | {row.measured()} |" for row in shown)]


def on_paper(rows: list[Row]) -> list[str]:
    """Estimate how many of the measured parts ACTORS need, each on a machine like this one."""
    size, offered, nodes = f"{TOKENS_A_TRAJECTORY:,} tokens", ACTORS * RATE, ACTORS // ACTORS_A_NODE
    queue = _median(rows, f"queue alone, {size}: ")
    recorder = _median(rows, f"recorder alone, {size}: trajectories")
    megabytes = _median(rows, f"recorder alone, {size}: written")
    listeners = max(int(row.figure.split()[0]) for row in rows if HEARD in row.figure)
    heard_ms = _median(rows, f"{listeners} actors{HEARD}")
    return ON_PAPER.format(
        actors=ACTORS,
        a_node=ACTORS_A_NODE,
        nodes=nodes,
        size=size,
        rate=RATE,
        offered=offered,
        recorder=recorder,
        megabytes=megabytes,
        recorders=math.ceil(offered / recorder),
        queue=queue,
        queues=math.ceil(offered / queue),
        listeners=listeners,
        heard_ms=heard_ms,
        max_calls=MAX_CALLS,
        relays=math.ceil(nodes / listeners),
    ).splitlines()


def _median(rows: list[Row], start: str) -> float:
    return next(row.median for row in rows if row.figure.startswith(start))
