"""`antiphon evaluate-rewards`: how often a reward model, or a service, prefers what was chosen, on any file of pairs.

The file is of the form of RewardBench (arXiv:2403.13787): prompt, chosen, rejected, and perhaps a subset. Knows no run
but its folder; scores offline, without Ray, or over HTTP.
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
from typing import Any, Protocol, get_args

from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from cluster.data.broken_rows import BrokenRows
from cluster.errors import InputError, RewardError
from cluster.scoring import Score, ScoreRequest
from deploy.config.schema import Column
from learner.supervised import calibration
from learner.supervised.examples import PairTexts, read_pair_texts

PAIRS_A_CALL = 64
TIMEOUT_S = 120.0
NUM_LISTED = 20
OVERALL = "overall"


Rewards = tuple[list[float], list[float], list[int]]


class Scores(Protocol):
    """What gives rewards; one that cannot be had is raised, or stands in its place."""

    async def outcomes(self, requests: Sequence[ScoreRequest]) -> Sequence[Score | RewardError]: ...
    async def aclose(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Result:
    """What was measured of some of the pairs."""

    num_pairs: int
    accuracy: float
    """Share of pairs whose chosen response got the higher reward; ties count half."""
    num_ties: int
    margin_mean: float
    ece: float
    """`learner.supervised.calibration.expected_calibration_error`."""


def evaluate_rewards(
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
    """Score every pair with the reward model in a folder or the service at a URL, and print a table by subset.

    Broken rows, and those that can't be scored, are told by file and line and left out, unless `strict`. Raises
    InputError and RewardError.
    """
    broken = BrokenRows("error" if strict else "skip")
    texts = read_pair_texts(
        file, _tokenizer(tokenizer or reward_model), others=("subset",), columns=columns, broken=broken
    )
    chosen, rejected, scored = asyncio.run(_all_rewards(texts, _scores(reward_model, url, scorer), broken))
    if not scored:
        raise InputError(str(file), f"no pair could be scored; {broken.errors[0]}")
    subsets = texts.examples.columns.get("subset", [None] * len(texts.prompts))
    results = by_subset(chosen, rejected, [subsets[row] for row in scored])
    _print(results)
    _say_broken(broken)
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


class Offline:
    """The reward model in a folder."""

    def __init__(self, folder: Path) -> None:
        from reward_service.scorers.reward_model import RewardModelScorer

        self._scorer = RewardModelScorer(folder)

    async def outcomes(self, requests: Sequence[ScoreRequest]) -> Sequence[Score | RewardError]:
        """One outcome a request."""
        return await self._scorer.score(requests)

    async def aclose(self) -> None:
        """Let its thread end."""
        self._scorer.close()


def _scores(reward_model: Path | None, url: str | None, scorer: str | None) -> Scores:
    if reward_model is not None:
        return Offline(reward_model)
    assert url is not None
    from reward_service.client.http import HttpRewardClient

    return HttpRewardClient(url, os.environ.get("ANTIPHON_TOKEN"), TIMEOUT_S, scorer=scorer)


async def _all_rewards(texts: PairTexts, scores: Scores, broken: BrokenRows) -> Rewards:
    """As `_rewards`; what gives them is closed at the end."""
    async with contextlib.aclosing(scores):
        return await _rewards(texts, scores, broken)


async def _rewards(texts: PairTexts, scores: Scores, broken: BrokenRows) -> Rewards:
    """Rewards of the chosen and of the rejected responses, and which pairs they are of; short pairs go first."""
    chosen, rejected, scored = list[float](), list[float](), list[int]()
    order = sorted(range(len(texts.prompts)), key=lambda row: len(texts.prompts[row]) + _longest(texts, row))
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("scoring", total=len(order))
        for start in range(0, len(order), PAIRS_A_CALL):
            rows = order[start : start + PAIRS_A_CALL]
            outcomes = await scores.outcomes([request for row in rows for request in _requests(texts, row)])
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
    """The results of each subset, in the order of their names, and of all pairs; no subsets, only those of all."""
    rows: dict[str, list[int]] = {}
    for row, subset in enumerate(subsets):
        if subset is not None:
            rows.setdefault(str(subset), []).append(row)
    parts = {**dict(sorted(rows.items())), OVERALL: list(range(len(chosen)))}
    return {name: _result([chosen[i] for i in part], [rejected[i] for i in part]) for name, part in parts.items()}


def _result(chosen: Sequence[float], rejected: Sequence[float]) -> Result:
    margins = [a - b for a, b in zip(chosen, rejected, strict=True)]
    told = calibration.measures(chosen, rejected)
    return Result(len(margins), told["accuracy"], calibration.num_ties(margins), told["margin_mean"], told["ece"])


def _print(results: Mapping[str, Result]) -> None:
    table = Table(box=box.ROUNDED, header_style="dim")
    table.add_column("subset")
    for heading in ("pairs", "accuracy", "ties", "mean margin", "ECE"):
        table.add_column(heading, justify="right")
    for name, result in results.items():
        row = (f"{result.num_pairs:,}", f"{result.accuracy:.1%}", f"{result.num_ties:,}", f"{result.margin_mean:.3f}")
        table.add_row(name, *row, f"{result.ece:.3f}", style="bold" if name == OVERALL else None)
    Console(highlight=False).print(table)


def _say_broken(broken: BrokenRows) -> None:
    if broken.num_unpaired:
        print(f"{broken.num_unpaired:,} rows with a label have no counterpart: left out", file=sys.stderr)
    if not broken.errors:
        return
    for error in broken.errors[:NUM_LISTED]:
        print(f"left out: {error}", file=sys.stderr)
    more = len(broken.errors) - NUM_LISTED
    print(f"{len(broken.errors):,} rows were left out" + (f", {more:,} more" if more > 0 else ""), file=sys.stderr)


def parse_columns(pairs: Sequence[str]) -> dict[str, str]:
    """Names such as `prompt=question`: ours, then the file's. Raises InputError for one that is not of that form."""
    names = (*get_args(Column), "subset")
    columns: dict[str, str] = {}
    for pair in pairs:
        ours, equals, theirs = pair.partition("=")
        if not equals or not theirs or ours not in names:
            raise InputError("--columns", f"{pair!r} is not NAME=COLUMN with a NAME of {', '.join(names)}")
        if ours in columns or theirs in columns.values():
            raise InputError("--columns", f"{pair!r} names again what another one does")
        columns[ours] = theirs
    return columns
