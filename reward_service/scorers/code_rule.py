"""The kind `code`: runs the item's unit tests on the response's Python code, in a sandbox."""

from __future__ import annotations

import platform
from pathlib import Path

from cluster.errors import RewardError
from cluster.scoring import ScoreRequest
from reward_service.config.scorers import CodeConfig
from reward_service.parsing import fenced
from reward_service.parsing.fenced import PYTHON, last_block
from reward_service.sandbox import sandbox
from reward_service.sandbox.sandbox import Limits, Report, run_confined
from reward_service.scorers.rule_scorer import Rule, RuleScorer, Verdict, references_of, rule_version
from reward_service.scorers.scorer import Builder, Kind, Scorer, register_kind

MAX_SLOWDOWN = 1.25
"""Slowdown of work that counts as noise if wall-clock time and CPU time are almost equal."""
MIN_PREEMPTED_PER_S = 5.0
"""A program that is taken from the CPU less often does not want it: it sleeps or waits."""
SOURCES = (Path(__file__), Path(fenced.__file__), Path(sandbox.__file__), sandbox.CHILD)


def limits_of(config: CodeConfig) -> Limits:
    """Return the resources that an item's code may use."""
    return Limits(config.cpu_s, config.wall_s, config.memory_mb, config.max_threads, config.scratch_mb)


def code_rule(config: CodeConfig) -> Rule:
    """The share of the item's tests that the last fenced block of Python passes.

    If code uses up its CPU time or its wall-clock time, the tests that passed before count. Raises RewardError for a
    test that is not Python, and if the machine was too busy to give the code its CPU time.
    """

    def rule(request: ScoreRequest) -> Verdict:
        tests = references_of(request, config.tests)
        if not all(isinstance(test, str) for test in tests):
            raise RewardError(config.tests, f"a test of {request.id} is not text")
        try:
            report = run_confined(last_block(request.response, PYTHON), tests, limits_of(config))
        except RewardError as error:
            raise RewardError(error.where, f"{error.what} (scoring {request.id})") from error
        if report.broken:
            raise RewardError(config.tests, f"test {report.broken[0]} of {request.id} is not valid Python")
        if report.ended == "late" and is_starved(report, config):
            what = f"the machine is too busy: {config.wall_s:g} s did not give {request.id} its {config.cpu_s} s of CPU"
            raise RewardError("sandbox", what)
        passed = sum(report.passed)
        share = passed / len(tests)
        reward = float(share == 1) if config.all_or_nothing else share
        return reward, {"num_tests": float(len(tests)), "num_passed": float(passed)}

    return rule


def is_starved(report: Report, config: CodeConfig) -> bool:
    """Return whether a late program did not get its CPU time because the machine was busy."""
    given_s = config.wall_s / report.slowdown
    wanted = report.num_preempted >= MIN_PREEMPTED_PER_S * config.wall_s
    return wanted and given_s < min(config.cpu_s, config.wall_s / MAX_SLOWDOWN)


def _build(name: str, config: CodeConfig, builder: Builder) -> Scorer:
    sandbox.check_confinement(limits_of(config), f"reward_service.scorers.{name}")
    version = rule_version(name, config, f"Python {platform.python_version()}", *SOURCES, libraries=())
    return RuleScorer(name, code_rule(config), version=version, num_threads=config.num_processes)


register_kind(CodeConfig, Kind(_build))
