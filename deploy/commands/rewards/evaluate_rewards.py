"""`antiphon evaluate-rewards`: measure the accuracy of a reward model or service on pairs.

The file has the form of RewardBench (arXiv:2403.13787): prompt, chosen, rejected and optionally subset. Scores with the
model in this process, without Ray, or over HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Protocol

import typer
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from cluster.data.invalid_rows import BrokenRows
from cluster.errors import InputError, RewardError
from cluster.scoring import Score, ScoreRequest
from deploy.run.open import require_run
from deploy.run.stages import not_done
from learner.supervised import calibration
from learner.supervised.examples import PairTexts, read_pair_texts

PAIRS_PER_CALL = 64
TIMEOUT_S = 120.0
NUM_LISTED = 20
OVERALL = "overall"


Rewards = tuple[list[float], list[float], list[int]]
"""Rewards of the chosen responses, rewards of the rejected responses, and the rows of the pairs."""


class RewardSource(Protocol):
    """Scores responses: a reward model in this process or a reward service."""

    async def outcomes(self, requests: Sequence[ScoreRequest]) -> Sequence[Score | RewardError]:
        """Return the score of each request, or the error that prevented it."""
        ...

    async def aclose(self) -> None:
        """Release the model or the connection."""
        ...


@dataclass(frozen=True, slots=True)
class Result:
    """Measurements on a subset of the pairs."""

    num_pairs: int
    accuracy: float
    """Share of pairs whose chosen response has the higher reward; ties count half."""
    num_ties: int
    margin_mean: float
    ece: float
    """Expected calibration error, see `learner.supervised.calibration`."""


def evaluate_rewards(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="Pairs with the columns prompt, chosen, rejected and maybe subset.")
    ],
    run: Annotated[Path | None, typer.Option(help="Evaluate the reward model of this run.")] = None,
    reward_model: Annotated[Path | None, typer.Option(help="Evaluate the reward model in this folder.")] = None,
    url: Annotated[
        str | None, typer.Option(help="Evaluate the reward service at this URL, with the token ANTIPHON_TOKEN if set.")
    ] = None,
    scorer: Annotated[str | None, typer.Option(help="With --url: name or version of the scorer.")] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Folder of the tokenizer whose chat template formats messages.")
    ] = None,
    columns: Annotated[
        list[str] | None, typer.Option(help="Column names of FILE, such as prompt=question. Repeatable.")
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Fail at an invalid row instead of leaving it out.")] = False,
    json_path: Annotated[Path | None, typer.Option("--json", help="Also write the results to this file.")] = None,
) -> None:
    """Measure how often a reward model prefers the chosen response, by subset (RewardBench's form).

    FILE is a data set in any format that `data.preferences` reads. Give one of --run, --reward-model and --url.

    [dim]antiphon evaluate-rewards pairs.jsonl --run runs/reviews[/dim]
    """
    if sum(source is not None for source in (run, reward_model, url)) != 1:
        raise InputError("evaluate-rewards", "give one of --run, --reward-model and --url")
    if scorer is not None and url is None:
        raise InputError("--scorer", "selects a scorer of the service at --url; give --url too")
    if run is not None:
        reward_model = require_run(run).path / "reward_model"
        if not (reward_model / "config.json").exists():
            raise not_done("reward_model")
    measure_accuracy(
        file,
        reward_model=reward_model,
        url=url,
        scorer=scorer,
        tokenizer=tokenizer,
        columns=parse_columns(columns or ()),
        strict=strict,
        json_path=json_path,
    )


def measure_accuracy(
    file: Path,
    *,
    reward_model: Path | None,
    url: str | None,
    scorer: str | None,
    tokenizer: Path | None,
    columns: Mapping[str, str],
    strict: bool,
    json_path: Path | None,
) -> None:
    """Score every pair with a reward model or the service at a URL, and print a table by subset.

    Invalid rows and rows that cannot be scored are left out and listed with file and line; with `strict` they raise
    InputError. Raises RewardError if the service fails.
    """
    broken = BrokenRows("error" if strict else "skip")
    texts = read_pair_texts(
        file, _tokenizer(tokenizer or reward_model), others=("subset",), columns=columns, broken=broken
    )
    chosen, rejected, scored = asyncio.run(_score_and_close(texts, reward_source(reward_model, url, scorer), broken))
    if not scored:
        raise InputError(str(file), f"no pair could be scored; {broken.errors[0]}")
    subsets = texts.examples.columns.get("subset", [None] * len(texts.prompts))
    results = by_subset(chosen, rejected, [subsets[row] for row in scored])
    _print(results)
    _list_left_out(broken)
    if json_path is not None:
        _write(json_path, file, results, broken)


def _write(path: Path, file: Path, results: Mapping[str, Result], broken: BrokenRows) -> None:
    report = {
        "file": str(file),
        "results": {name: asdict(result) for name, result in results.items()},
        "broken": [str(error) for error in broken.errors],
        "num_unpaired": broken.num_unpaired,
    }
    try:
        path.write_text(json.dumps(report, indent=2) + "\n")
    except OSError as error:
        raise InputError(str(path), f"cannot be written ({error.strerror or error})") from error


def _tokenizer(folder: Path | None) -> Any:
    if folder is None:
        return None
    from learner.model.tokenizer import load_tokenizer

    return load_tokenizer(folder)


class LocalRewardModel:
    """The reward model in a folder, in this process."""

    def __init__(self, folder: Path) -> None:
        from reward_service.scorers.reward_model import RewardModelScorer

        self._scorer = RewardModelScorer(folder)

    async def outcomes(self, requests: Sequence[ScoreRequest]) -> Sequence[Score | RewardError]:
        """Return one outcome for each request."""
        return await self._scorer.score(requests)

    async def aclose(self) -> None:
        """End the model's thread."""
        self._scorer.close()


def reward_source(reward_model: Path | None, url: str | None, scorer: str | None) -> RewardSource:
    """Return the reward model in a folder, or a client of the service at `url`."""
    if reward_model is not None:
        return LocalRewardModel(reward_model)
    assert url is not None
    from reward_service.client.http import HttpRewardClient

    return HttpRewardClient(url, os.environ.get("ANTIPHON_TOKEN"), TIMEOUT_S, scorer=scorer)


async def _score_and_close(texts: PairTexts, source: RewardSource, broken: BrokenRows) -> Rewards:
    async with contextlib.aclosing(source):
        return await _score(texts, source, broken)


async def _score(texts: PairTexts, source: RewardSource, broken: BrokenRows) -> Rewards:
    """Score all pairs, the shortest first; `broken` collects those that cannot be scored."""
    chosen, rejected, scored = list[float](), list[float](), list[int]()
    order = sorted(range(len(texts.prompts)), key=lambda row: len(texts.prompts[row]) + _longest(texts, row))
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("scoring", total=len(order))
        for start in range(0, len(order), PAIRS_PER_CALL):
            rows = order[start : start + PAIRS_PER_CALL]
            outcomes = await source.outcomes([request for row in rows for request in _requests(texts, row)])
            for row, first, second in zip(rows, outcomes[::2], outcomes[1::2], strict=True):
                with broken.row():
                    chosen_reward, rejected_reward = (_reward(texts, row, outcome) for outcome in (first, second))
                    chosen.append(chosen_reward)
                    rejected.append(rejected_reward)
                    scored.append(row)
            progress.advance(task, len(rows))
    return chosen, rejected, scored


def _longest(texts: PairTexts, row: int) -> int:
    return max(len(texts.chosen[row]), len(texts.rejected[row]))


def _requests(texts: PairTexts, row: int) -> list[ScoreRequest]:
    prompt = texts.prompts[row]
    return [
        ScoreRequest(f"{row}-chosen", prompt, texts.chosen[row]),
        ScoreRequest(f"{row}-rejected", prompt, texts.rejected[row]),
    ]


def _reward(texts: PairTexts, row: int, outcome: Score | RewardError) -> float:
    if isinstance(outcome, RewardError):
        raise InputError(texts.examples.where(row), str(outcome))
    return outcome.reward


def by_subset(chosen: Sequence[float], rejected: Sequence[float], subsets: Sequence[Any]) -> dict[str, Result]:
    """Return the result of each subset, sorted by name, then that of all pairs (`OVERALL`)."""
    rows: dict[str, list[int]] = {}
    for row, subset in enumerate(subsets):
        if subset is not None:
            rows.setdefault(str(subset), []).append(row)
    parts = {**dict(sorted(rows.items())), OVERALL: list(range(len(chosen)))}
    return {name: _result([chosen[i] for i in part], [rejected[i] for i in part]) for name, part in parts.items()}


def _result(chosen: Sequence[float], rejected: Sequence[float]) -> Result:
    margins = [a - b for a, b in zip(chosen, rejected, strict=True)]
    measures = calibration.measures(chosen, rejected)
    num_ties = calibration.num_ties(margins)
    return Result(len(margins), measures["accuracy"], num_ties, measures["margin_mean"], measures["ece"])


def _print(results: Mapping[str, Result]) -> None:
    table = Table(box=box.ROUNDED, header_style="dim")
    table.add_column("subset")
    for heading in ("pairs", "accuracy", "ties", "mean margin", "ECE"):
        table.add_column(heading, justify="right")
    for name, result in results.items():
        row = (f"{result.num_pairs:,}", f"{result.accuracy:.1%}", f"{result.num_ties:,}", f"{result.margin_mean:.3f}")
        table.add_row(name, *row, f"{result.ece:.3f}", style="bold" if name == OVERALL else None)
    Console(highlight=False).print(table)


def _list_left_out(broken: BrokenRows) -> None:
    if broken.num_unpaired:
        print(f"{broken.num_unpaired:,} labelled rows have no counterpart and were left out", file=sys.stderr)
    if not broken.errors:
        return
    for error in broken.errors[:NUM_LISTED]:
        print(f"left out: {error}", file=sys.stderr)
    more = len(broken.errors) - NUM_LISTED
    print(f"{len(broken.errors):,} rows were left out" + (f", {more:,} more" if more > 0 else ""), file=sys.stderr)


def parse_columns(pairs: Sequence[str]) -> dict[str, str]:
    """Parse NAME=COLUMN pairs such as `prompt=question` into a dict. Raises InputError for any other form."""
    columns: dict[str, str] = {}
    for pair in pairs:
        ours, equals, theirs = pair.partition("=")
        if not equals or not theirs or not ours:
            raise InputError("--columns", f"{pair!r} is not NAME=COLUMN")
        if ours in columns or theirs in columns.values():
            raise InputError("--columns", f"{pair!r} repeats a name or a column")
        columns[ours] = theirs
    return columns
