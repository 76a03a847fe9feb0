"""Rules in a worker process, as a hostile text could block them: mathematics and JSON Schema."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluster.errors import RewardError
from cluster.scoring import ScoreRequest
from reward_service.config.scorers import JsonSchemaConfig, MathConfig
from reward_service.parsing import fenced
from reward_service.parsing.fenced import last_block
from reward_service.sandbox import worker
from reward_service.sandbox.worker import OutOfCpuTime, Workers
from reward_service.scorers.files import read_schema
from reward_service.scorers.rule_scorer import Rule, RuleScorer, Verdict, references_of, rule_version
from reward_service.scorers.scorer import Builder, Kind, Scorer, register_kind

SOURCES = (Path(fenced.__file__), Path(__file__), worker.CHILD)
MATH_LIBRARIES = ("math-verify", "latex2sympy2_extended", "sympy")


def math_rule(config: MathConfig, workers: Workers) -> Rule:
    """1 if the response's last expression equals a reference, 0 also if that can't be found out in time.

    Raises RewardError if a reference has no expression.
    """

    def rule(request: ScoreRequest) -> Verdict:
        question = {"references": list(map(str, references_of(request))), "response": request.response}
        answer = _ask(workers, question, request)
        if answer is None:
            return 0.0, {"found": 0.0}
        if not answer["readable"]:
            raise RewardError("references", f"a reference of {request.id} has no expression that can be read")
        return float(answer["equal"]), {"found": float(answer["found"])}

    return rule


def json_schema_rule(config: JsonSchemaConfig, workers: Workers) -> Rule:
    """1 if the last fenced block, or the whole response, is JSON that the schema allows, as found out in time."""

    def rule(request: ScoreRequest) -> Verdict:
        answer = _ask(workers, last_block(request.response), request)
        if answer is None:
            return 0.0, {"parsed": 0.0}
        return float(answer["valid"]), {"parsed": float(answer["parsed"])}

    return rule


def _ask(workers: Workers, question: Any, request: ScoreRequest) -> Any:
    """Return the answer, or None if the question took too much CPU time or memory. Raises RewardError."""
    try:
        return workers.ask(question)
    except OutOfCpuTime:
        return None
    except TimeoutError:
        raise RewardError("worker", f"{request.id} got too little CPU time: the machine is busy") from None
    except RewardError as error:
        raise RewardError("worker", f"{error.what} (scoring {request.id})") from error


def _build_math(name: str, config: MathConfig, builder: Builder) -> Scorer:
    num = config.num_processes
    workers = Workers("math", None, cpu_s=config.timeout_s, num=num)
    version = rule_version(name, config, *SOURCES, libraries=MATH_LIBRARIES)
    return RuleScorer(name, math_rule(config, workers), version=version, num_threads=num, on_close=workers.close)


def _build_json_schema(name: str, config: JsonSchemaConfig, builder: Builder) -> Scorer:
    workers = Workers("json_schema", read_schema(config), cpu_s=config.timeout_s)
    file = [config.path] if config.path is not None else []
    version = rule_version(name, config, *SOURCES, *file, libraries=("jsonschema",))
    return RuleScorer(name, json_schema_rule(config, workers), version=version, on_close=workers.close)


def _check_schema(name: str, config: JsonSchemaConfig, folders: Mapping[str, Path]) -> None:
    read_schema(config)


register_kind(MathConfig, Kind(_build_math))
register_kind(JsonSchemaConfig, Kind(_build_json_schema, _check_schema))
