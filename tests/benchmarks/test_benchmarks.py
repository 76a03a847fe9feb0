"""Every benchmark can be imported, and its parts that need no Ray, GPU or training work."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import pkgutil
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import benchmarks
from benchmarks import results, tables
from benchmarks.__main__ import BENCHMARKS, app
from benchmarks.gpu import engine
from benchmarks.gpu import learner as learner_gpu
from benchmarks.parts import overlap, recorders
from benchmarks.parts.bare_loop import BareLoop
from benchmarks.parts.learner_step import batch
from benchmarks.peer import trl
from benchmarks.results import ROOT, Row
from benchmarks.scale.parts import finished_group
from benchmarks.tasks import chat, lag_study
from benchmarks.tasks.letters import letters_config, make_task
from benchmarks.tasks.runs import Finished
from cluster.journal import events
from cluster.journal.files import read_log
from cluster.journal.recorder import Recorder
from cluster.trajectory import Ticket
from deploy.config.load import load_run_config
from deploy.run.stages import STAGES

RAYS = "_ray_trace_ctx"
OTHER_ENVIRONMENT = ("benchmarks.peer.trl_peer", "benchmarks.peer.trl_preferences")
MODULES = [module.name for module in pkgutil.walk_packages(benchmarks.__path__, "benchmarks.")]


@pytest.mark.parametrize("name", [name for name in MODULES if name not in OTHER_ENVIRONMENT])
def test_every_benchmark_module_can_be_imported(name: str) -> None:
    assert importlib.import_module(name).__doc__


def test_the_peer_script_exists_beside_its_benchmark() -> None:
    assert set(OTHER_ENVIRONMENT) <= set(MODULES)
    compile(trl.PEER.read_text(), trl.PEER, "exec")


def test_the_command_refuses_an_unknown_benchmark() -> None:
    result = CliRunner().invoke(app, ["letters", "unknown"])
    assert result.exit_code == 2
    assert "no benchmark unknown" in result.output


@pytest.mark.process
def test_results_are_read_as_they_were_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "FOLDER", tmp_path / "results")
    rows = [Row("first", (1.0, 3.0), "s", "<= 5"), Row("second", (1234.5,))]
    results.write("name", "Title", rows, command="python -m benchmarks name", seeds=(0, 1))
    record, found = results.read("name")
    assert found == rows
    assert [row.measured() for row in found] == ["2 (1-3) s", "1,234"]
    assert {"title", "command", "date", "commit", "seeds", "machine", "versions", "rows"} == set(record)


def test_every_benchmark_has_a_place_in_the_tables() -> None:
    assert set(tables.ORDER) == set(BENCHMARKS)
    assert "Not measured yet: `absent`." in tables.table(["absent"])
    assert tables.task_table("absent") == "Not measured yet.\n"


@pytest.mark.parametrize("recorder_class", [recorders.Timed, recorders.KeepsNothing])
async def test_a_recorder_accepts_the_calls_of_the_ppo_stage(recorder_class: type, tmp_path: Path) -> None:
    ticket = Ticket(0, 0, 0, 0, {"prompt": "say"}, "client")
    recorder = recorder_class(tmp_path / "records")
    await recorder.open()
    await recorder.begin("incarnation", version=0, group=0, num_steps=1)
    await recorder.record([events.admit(ticket)])
    await recorder.close()
    if recorder_class is recorders.Timed:
        assert len(read_log(tmp_path / "records", ("kind",))) == 2
        assert (tmp_path / recorders.WAITS).exists()
    assert list(tmp_path.iterdir()) == [] or recorder_class is recorders.Timed


@pytest.mark.parametrize("recorder_class", [recorders.Timed, recorders.KeepsNothing])
@pytest.mark.parametrize("method", ["open", "begin", "record", "close"])
def test_a_recorder_has_the_signatures_of_the_real_one(recorder_class: type, method: str) -> None:
    assert parameters(getattr(recorder_class, method)) == parameters(getattr(Recorder, method))


def parameters(method: Callable[..., Any]) -> list[str]:
    """Parameters as they are written; Ray adds one for traces to the methods of a class once it is an actor."""
    return [str(parameter) for name, parameter in inspect.signature(method).parameters.items() if name != RAYS]


@pytest.mark.parametrize(("name", "recorder_class"), [("timed", recorders.Timed), ("nothing", recorders.KeepsNothing)])
async def test_the_ppo_stage_uses_the_recorder_that_is_named(
    name: str, recorder_class: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[type] = []

    async def run_ppo(session: object, *, recorder_class: type) -> None:
        used.append(recorder_class)

    monkeypatch.setitem(STAGES, "ppo", STAGES["ppo"])
    monkeypatch.setattr(sys, "argv", ["recorders", name, "train"])
    monkeypatch.setattr(recorders, "app", lambda: None)
    monkeypatch.setattr(recorders, "run_ppo", run_ppo)
    recorders.main()
    module, _, function = STAGES["ppo"].function.partition(":")
    await getattr(importlib.import_module(module), function)(None)
    assert used == [recorder_class]
    assert sys.argv == ["recorders", "train"]


def test_overlap_is_measured_in_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"GROUPS_PER_STEP": 4, "RESPONSE_TOKENS": 4, "NUM_STEPS": 8, "TOKEN_S": 0.002, "LEARN_S": 0.008}
    for name, value in sizes.items():
        monkeypatch.setattr(overlap, name, value)
    (row,) = asyncio.run(overlap.measure())
    assert 0 < row.median <= 1.1


def test_the_bare_loop_changes_the_policy(tmp_path: Path) -> None:
    model, rows = make_task(tmp_path)
    loop = BareLoop(str(model), letters_config(num_steps=1, max_policy_lag=0).learner)
    before = [parameter.clone() for parameter in loop._parameters]
    loop.step(batch(1, 4))
    assert rows
    assert any(not torch.equal(a, b) for a, b in zip(before, loop._parameters, strict=True))


def test_a_group_of_the_scale_benchmark_can_be_recorded() -> None:
    _, (trajectory,) = finished_group(Ticket(0, 0, 0, 0, {"prompt": "say"}, "client"), 8)
    assert sum(trajectory.mask) == 8
    assert events.finished(trajectory)


@pytest.mark.skipif(torch.cuda.is_available(), reason="measures on a GPU")
def test_the_gpu_benchmarks_measure_nothing_without_a_gpu(tmp_path: Path) -> None:
    assert engine.measure(tmp_path) == learner_gpu.measure(tmp_path) == []


def _halves() -> defaultdict[str, Any]:
    return defaultdict(lambda: 0.5)


def _train(task: str, folder: Path, name: str, *lines: str, file: str = "run.toml", fresh: bool = True) -> Finished:
    """Validate the settings of a run, and return a run whose every metric is 0.5."""
    load_run_config(ROOT / "examples" / task / file, list(lines))
    metrics = _halves()
    metrics["tasks"] = defaultdict(_halves)
    return Finished({"evaluation": {"before": metrics, "after": metrics}}, [_halves() for _ in range(100)], 60.0)


@pytest.mark.parametrize("name", list(chat.TASKS))
def test_a_task_measures_the_figures_of_its_results(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "train", _train)
    rows = chat.TASKS[name][1](tmp_path)
    assert [row.figure for row in rows] == [row.figure for row in results.read(name)[1]]


def test_the_lag_study_measures_the_figures_of_its_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lag_study, "train", _train)
    rows = lag_study.measure(tmp_path)
    assert [row.figure for row in rows] == [row.figure for row in results.read("lag_study")[1]]
