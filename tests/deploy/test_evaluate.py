"""What the metrics function of a run file is given: prompts, responses, and the columns it takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from cluster.errors import InputError
from deploy import evaluate

ROWS = [{"prompt": "1 + 1?", "references": ["2"], "level": 1}, {"prompt": "2 + 2?", "references": ["4"], "level": 2}]


def texts_alone(prompts: Sequence[str], responses: Sequence[str]) -> dict[str, float]:
    return {"num": float(len(prompts) + len(responses))}


def names_one(prompts: Sequence[str], responses: Sequence[str], references: Sequence[list[str]]) -> dict[str, float]:
    return {"right": sum(r in each for r, each in zip(responses, references, strict=True)) / len(responses)}


def takes_all(prompts: Sequence[str], responses: Sequence[str], **columns: Any) -> dict[str, float]:
    return {name: float(len(values)) for name, values in columns.items()}


def does_without(prompts: Sequence[str], responses: Sequence[str], *, weights: Any = None) -> dict[str, float]:
    return {"is_given": float(weights is not None)}


def needs_another(prompts: Sequence[str], responses: Sequence[str], *, answers: Sequence[str]) -> dict[str, float]:
    return {}


@pytest.mark.parametrize(
    ("function", "measured"),
    [
        (texts_alone, {"num": 4.0}),
        (names_one, {"right": 0.5}),
        (takes_all, {"references": 2.0, "level": 2.0}),
        (does_without, {"is_given": 0.0}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_metrics_function_gets_the_columns_that_it_names_or_all_of_them(
    function: Callable[..., Any], measured: dict[str, float]
) -> None:
    assert evaluate.measure(f"{__name__}:{function.__name__}", ROWS, ["2", "5"]) == measured


def test_a_column_named_like_the_texts_does_not_take_their_place() -> None:
    rows = [row | {"responses": "kept from it", "prompts": "too"} for row in ROWS]
    assert evaluate.measure(f"{__name__}:takes_all", rows, ["2", "5"]) == {"references": 2.0, "level": 2.0}


def test_a_column_that_it_needs_and_the_data_lacks_is_named() -> None:
    message = r"evaluation.metrics: needs a column 'answers'; beside the prompts there is references, level"
    with pytest.raises(InputError, match=message):
        evaluate.measure(f"{__name__}:needs_another", ROWS, ["2", "5"])
