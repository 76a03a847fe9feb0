"""Store the answers of a policy to held-out prompts, summarize them and compare two policies."""

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
        ("question", pa.string()),
    ]
)
GREEDY = -1
"""The `sample` of a greedy answer: the likeliest token at each position."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer to the prompt of a row of a task; `parts` are values of the environment's `info`.

    `task` is '' in a run without named tasks. `question` is the last user message of the prompt, if it has messages.
    """

    row: int
    sample: int
    prompt: str
    response: str
    reward: float
    kl_nats: float = 0.0
    parts: Mapping[str, float] = field(default_factory=dict)
    task: str = ""
    question: str = ""

    @property
    def shown_prompt(self) -> str:
        """The part of the prompt to show beside responses."""
        return self.question or self.prompt


@dataclass(frozen=True, slots=True)
class Regression:
    """A prompt with better answers before: the first answer of each policy and the mean rewards."""

    prompt: str
    before: str
    after: str
    reward_before: float
    reward_after: float


def write(path: Path, answers: Iterable[Answer]) -> None:
    """Write the answers to a Parquet file; a failure leaves no partial file at `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{**asdict(answer), "parts": list(answer.parts.items())} for answer in answers]
    with replacing(path) as partial:
        pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), partial)


def read(path: Path) -> list[Answer]:
    """Read the answers that `write` wrote. Raises InputError if the file is missing or has other content."""
    try:
        table = pq.read_table(path, schema=SCHEMA)
    except (OSError, pa.ArrowException) as error:
        raise InputError(str(path), "has no stored answers (run antiphon evaluate)") from error
    rows = table.to_pylist()
    texts = ("task", "question")
    return [Answer(**{**row, "parts": dict(row["parts"] or ()), **{t: row[t] or "" for t in texts}}) for row in rows]


def of_task(answers: Iterable[Answer], task: str) -> list[Answer]:
    """Return the answers of one task, with the task name removed."""
    return [replace(answer, task="") for answer in answers if answer.task == task]


def by_row(answers: Iterable[Answer]) -> dict[tuple[str, int], list[Answer]]:
    """Group the sampled answers, without greedy ones, by task and row."""
    rows: dict[tuple[str, int], list[Answer]] = defaultdict(list)
    for answer in answers:
        if answer.sample != GREEDY:
            rows[answer.task, answer.row].append(answer)
    return dict(sorted(rows.items()))


def mean_rewards(answers: Iterable[Answer]) -> list[float]:
    """Return the mean reward of each row: rows are independent, answers to one prompt are not."""
    return [fmean(answer.reward for answer in group) for group in by_row(answers).values()]


def reward_interval(answers: Iterable[Answer]) -> Interval:
    """Return the mean reward with its confidence interval over prompts."""
    return bootstrap(mean_rewards(answers))


def pass_rates(answers: Sequence[Answer], pass_reward: float) -> dict[str, float]:
    """Return pass@k for k = 1, 2, 4, ... and all samples; a reward of at least `pass_reward` passes."""
    groups = list(by_row(answers).values())
    num = min(map(len, groups))
    rates = {}
    for k in sorted({num, *(2**i for i in range(num.bit_length()))}):
        shares = [pass_at_k(len(g), sum(a.reward >= pass_reward for a in g), k) for g in groups]
        rates[f"pass_at_{k}"] = fmean(shares)
    return rates


def in_common(
    after: Iterable[Answer], before: Iterable[Answer], where: str
) -> tuple[list[Answer], list[Answer], tuple[int, int]]:
    """Return the answers to the prompts that both answered, with equal row numbers, and how many each answered.

    Prompts are compared by their texts; of a prompt that comes several times, the first ones are paired. Raises
    InputError with `where` if there is none.
    """
    new, old = _by_prompt(after), _by_prompt(before)
    shared = [key for key in new if key in old]
    if not shared:
        raise InputError(where, "has answers to none of the same prompts")
    kept = [[replace(a, row=row) for row, key in enumerate(shared) for a in side[key]] for side in (new, old)]
    return kept[0], kept[1], (len(new), len(old))


def _by_prompt(answers: Iterable[Answer]) -> dict[tuple[str, str, int], list[Answer]]:
    """Group the sampled answers by task, prompt and how often the prompt came before."""
    found: dict[tuple[str, str, int], list[Answer]] = {}
    num_seen: dict[tuple[str, str], int] = defaultdict(int)
    for (task, _), group in by_row(answers).items():
        prompt = (task, group[0].prompt)
        found[*prompt, num_seen[prompt]] = group
        num_seen[prompt] += 1
    return found


def compare(after: Sequence[Answer], before: Sequence[Answer], where: str) -> tuple[Difference, list[Regression]]:
    """Return the difference `after` - `before` over prompts, and the worse prompts, the worst first.

    Raises InputError with `where` if the two did not answer the same prompts.
    """
    new, old = by_row(after), by_row(before)
    same = [row for row in new if row in old and new[row][0].prompt == old[row][0].prompt]
    if len(same) < len(new) or len(same) < len(old):
        message = f"has answers to other prompts: only {len(same)} of {len(new)} and {len(old)} are the same"
        raise InputError(where, message)
    pairs = [(fmean(a.reward for a in new[row]), fmean(a.reward for a in old[row])) for row in same]
    difference = paired_difference([pair[0] for pair in pairs], [pair[1] for pair in pairs])
    worse = [
        Regression(new[row][0].shown_prompt, old[row][0].response, new[row][0].response, reward_before, reward_after)
        for row, (reward_after, reward_before) in zip(same, pairs, strict=True)
        if reward_after < reward_before
    ]
    return difference, sorted(worse, key=lambda regression: regression.reward_after - regression.reward_before)
