"""What a policy answered to held-out prompts, answer by answer: kept, counted with intervals, compared in pairs.

Knows neither engines nor rewards; `deploy.evaluation.evaluate` asks for both.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.errors import InputError
from cluster.files import replacing
from deploy.evaluation.statistics import Difference, Interval, bootstrap, paired_difference, pass_at_k

SCHEMA = pa.schema(
    [
        ("task", pa.string()),
        ("row", pa.int64()),
        ("sample", pa.int64()),
        ("prompt", pa.string()),
        ("response", pa.string()),
        ("reward", pa.float64()),
        ("kl_nats", pa.float64()),
        ("parts", pa.map_(pa.string(), pa.float64())),
    ]
)
GREEDY = -1
"""The `sample` of an answer that was not drawn but chosen: the likeliest token, each time."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer to the prompt of one row of a task; `parts` are what the environment said of it.

    `task` is '' in a run that names no tasks.
    """

    row: int
    sample: int
    prompt: str
    response: str
    reward: float
    kl_nats: float = 0.0
    parts: Mapping[str, float] = field(default_factory=dict)
    task: str = ""


@dataclass(frozen=True, slots=True)
class Regression:
    """A prompt whose answers were better before: the first of each, and the mean rewards."""

    prompt: str
    before: str
    after: str
    reward_before: float
    reward_after: float


def write(path: Path, answers: Iterable[Answer]) -> None:
    """Keep them, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{**asdict(answer), "parts": list(answer.parts.items())} for answer in answers]
    with replacing(path) as partial:
        pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), partial)


def read(path: Path) -> list[Answer]:
    """The inverse of `write`. Raises InputError where there is no such file or it holds something else."""
    try:
        table = pq.read_table(path, schema=SCHEMA)
    except (OSError, pa.ArrowException) as error:
        raise InputError(str(path), "no answers are kept here (antiphon evaluate keeps them)") from error
    rows = table.to_pylist()
    return [Answer(**{**row, "parts": dict(row["parts"] or ()), "task": row["task"] or ""}) for row in rows]


def of_task(answers: Iterable[Answer], task: str) -> list[Answer]:
    """A task's answers alone, as those of a run that has no other task."""
    return [replace(answer, task="") for answer in answers if answer.task == task]


def by_row(answers: Iterable[Answer]) -> dict[tuple[str, int], list[Answer]]:
    """The drawn answers to the prompt of each task's each row."""
    rows: dict[tuple[str, int], list[Answer]] = defaultdict(list)
    for answer in answers:
        if answer.sample != GREEDY:
            rows[answer.task, answer.row].append(answer)
    return dict(sorted(rows.items()))


def mean_rewards(answers: Iterable[Answer]) -> list[float]:
    """Each row's mean reward: rows are independent, answers to one prompt are not."""
    return [fmean(answer.reward for answer in group) for group in by_row(answers).values()]


def reward_interval(answers: Iterable[Answer]) -> Interval:
    """The mean reward and its bounds over prompts."""
    return bootstrap(mean_rewards(answers))


def passed(answers: Sequence[Answer], pass_reward: float) -> dict[str, float]:
    """pass@k for 1, 2, 4, ... up to the samples of a prompt: an answer passes whose reward is at least that."""
    groups = list(by_row(answers).values())
    num = min(map(len, groups))
    found = {}
    for k in sorted({num, *(2**i for i in range(num.bit_length()))}):
        shares = [pass_at_k(len(g), sum(a.reward >= pass_reward for a in g), k) for g in groups]
        found[f"pass_at_{k}"] = fmean(shares)
    return found


def compared(after: Sequence[Answer], before: Sequence[Answer], where: str) -> tuple[Difference, list[Regression]]:
    """`after` less `before`, prompt by prompt, and the prompts where it is less, the worst first.

    Raises InputError at `where` where the two did not answer the same prompts.
    """
    new, old = by_row(after), by_row(before)
    same = [row for row in new if row in old and new[row][0].prompt == old[row][0].prompt]
    if len(same) < len(new) or len(same) < len(old):
        what = f"answered other prompts: {len(same)} of {len(new)} and {len(old)} are the same"
        raise InputError(where, what)
    pairs = [(fmean(a.reward for a in new[row]), fmean(a.reward for a in old[row])) for row in same]
    difference = paired_difference([pair[0] for pair in pairs], [pair[1] for pair in pairs])
    worse = [
        Regression(new[row][0].prompt, old[row][0].response, new[row][0].response, reward_before, reward_after)
        for row, (reward_after, reward_before) in zip(same, pairs, strict=True)
        if reward_after < reward_before
    ]
    return difference, sorted(worse, key=lambda regression: regression.reward_after - regression.reward_before)
