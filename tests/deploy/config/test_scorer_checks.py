"""Columns that scorers and metrics need are looked for by the check, without importing any function."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from cluster.errors import InputError
from deploy.config.load import load_run_config
from deploy.config.scorer_checks import check_scorer_columns, columns_of_prompts

RUN = """
[run]
stages = ["ppo", "evaluation"]
[model]
path = "model"
[data]
prompts = "prompts.jsonl"
[reward_service]
scorer = "{scorer}"
{more}
"""
FUNCTIONS = """
raise RuntimeError("imported")
from functools import partial
from own_others import elsewhere, Reward as Renamed

def ours(prompts, responses, solution): ...
def ours_optional(prompts, responses, *, solution=None, **columns): ...
def one_text(text): ...
def trl(completions, solution, trainer_state, log_metric, **kwargs): ...
def trl_ids(completion_ids, completions, prompts): ...
async def openrlhf(queries, prompts, labels, **kwargs): ...
def verl(data_source, solution_str, ground_truth, extra_info=None): ...
def verl_more(data_source, solution_str, ground_truth, router): ...
def metric(prompts, responses, solution): ...
bound = partial(ours, solution=None)

@partial
def decorated(prompts, responses, solution): ...

class Reward:
    def __call__(self, completions, solution): ...
"""
OTHERS = """
def elsewhere(prompts, responses, level): ...
class Reward:
    def __call__(self, completions, answer): ...
"""


def check(folder: Path, scorer: str, more: str = "") -> None:
    (folder / "run.toml").write_text(RUN.format(scorer=scorer, more=more))
    config = load_run_config(folder / "run.toml")
    check_scorer_columns(config, columns_of_prompts(config))


def refused(folder: Path, scorer: str, more: str = "") -> str:
    with pytest.raises(InputError) as caught:
        check(folder, scorer, more)
    return str(caught.value)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with prompts and functions; importing them raises."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a", "answer": "b", "labels": "c"}\n')
    (tmp_path / "own_functions.py").write_text(FUNCTIONS)
    (tmp_path / "own_others.py").write_text(OTHERS)
    return tmp_path


@pytest.mark.parametrize("name", ["ours_optional", "trl_ids", "openrlhf", "verl", "bound", "decorated", "Renamed"])
def test_function_that_fits_or_can_not_be_read_passes(folder: Path, name: str) -> None:
    check(folder, f"own_functions:{name}")


@pytest.mark.parametrize(
    ("name", "what"),
    [
        (
            "ours",
            "(own_functions.py:6) needs 'solution'; there is answer, completion_ids",
        ),
        ("elsewhere", "(own_functions.py:4) needs 'level'; there is answer"),
        ("trl", "needs 'solution'; there is answer"),
        ("Reward", "needs 'solution'; there is answer"),
        ("verl_more", "needs 'router'; there is data_source, extra_info, ground_truth, solution_str"),
        ("one_text", "takes neither two texts by position nor the argument responses"),
    ],
)
def test_function_that_does_not_fit_is_named_with_the_columns(folder: Path, name: str, what: str) -> None:
    started = time.monotonic()
    error = refused(folder, f"own_functions:{name}")
    assert error.startswith(f"reward_service.scorer: own_functions:{name} (")
    assert what in error
    assert error.endswith("prompts.jsonl has answer, labels")
    assert time.monotonic() - started < 1


@pytest.mark.parametrize(
    ("scorer", "needed"),
    [
        ('{ kind = "exact" }', "references"),
        ('{ kind = "numeric" }', "references"),
        ('{ kind = "math" }', "references"),
        ('{ kind = "code", tests = "unit_tests" }', "unit_tests"),
        ('{ kind = "judge", url = "http://x", model = "m", rubric = "{response} {reference}" }', "references"),
    ],
)
def test_kind_that_needs_a_column_which_the_data_lacks_is_refused(folder: Path, scorer: str, needed: str) -> None:
    more = f'[reward_service.scorers]\npart = {scorer}\nall = {{ kind = "composite", parts = {{ part = 1.0 }} }}'
    what = f"needs the column {needed!r}, and prompts.jsonl has answer, labels: add it, or rename one in data.columns"
    assert refused(folder, "all", more) == f"reward_service.scorers.part: {what}"
    check(folder, "own_functions:ours_optional", more)  # it is served, but not used


def test_metric_that_needs_a_missing_column_is_refused(folder: Path) -> None:
    error = refused(folder, "own_functions:ours_optional", '[evaluation]\nmetrics = "own_functions:metric"')
    what = "own_functions:metric (own_functions.py:14) needs the column 'solution'; prompts.jsonl has answer, labels"
    assert error == f"evaluation.metrics: {what}"


def test_functions_of_another_service_are_not_looked_at(folder: Path) -> None:
    check(folder, "own_functions:ours", 'url = "http://127.0.0.1:9"')
