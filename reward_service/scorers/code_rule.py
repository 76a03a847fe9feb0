"""Judges the Python code of a response by the item's unit tests. How it is confined is `confined`'s affair."""

from __future__ import annotations

from cluster.errors import RewardError
from cluster.scoring import ScoreRequest
from reward_service.config.scorers import CodeConfig
from reward_service.sandbox.sandbox import Limits, run_confined
from reward_service.scorers.checked_rules import last_block
from reward_service.scorers.rules import Rule, Verdict, references_of


def limits_of(config: CodeConfig) -> Limits:
    """What an item's code may use."""
    return Limits(config.cpu_s, config.wall_s, config.memory_mb, config.max_threads, config.scratch_mb)


def code_rule(config: CodeConfig) -> Rule:
    """The share of the item's tests that the last fenced block passes.

    Code that uses up its CPU time has what it passed till then. A test that is no Python, and code that is not done
    when its time on the clock is over, are the item's error.
    """

    def rule(request: ScoreRequest) -> Verdict:
        tests = references_of(request, config.tests)
        if not all(isinstance(test, str) for test in tests):
            raise RewardError(config.tests, f"a test of {request.id} is no text")
        try:
            report = run_confined(last_block(request.response), tests, limits_of(config))
        except RewardError as error:
            raise RewardError(error.where, f"{error.what} (scoring {request.id})") from error
        if report.broken:
            raise RewardError(config.tests, f"test {report.broken[0]} of {request.id} is no Python")
        if report.ended == "late":
            raise RewardError("confinement", f"{request.id} took longer than {config.wall_s:g} s on the clock")
        passed = sum(report.passed)
        share = passed / len(tests)
        reward = float(share == 1) if config.all_or_nothing else share
        return reward, {"num_tests": float(len(tests)), "num_passed": float(passed)}

    return rule
