"""Script of a worker process: one task, first its setup, then one question per line.

Imports no package of Antiphon.

`math`: is a response equal to a reference? `json_schema`: is a response JSON that the schema allows?
"""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import sys
from collections.abc import Callable
from typing import Any

MEMORY_BYTES = 2 << 30
Answer = Callable[[Any], Any]


def math_task(setup: Any) -> Answer:
    """Return a function that compares {"references", "response"} with math-verify.

    Its answer says whether all references and the response have an expression, and whether one is equal. math-verify's
    timeouts are off: the parent kills this process.
    """
    from math_verify import parse, verify

    logging.disable(logging.CRITICAL)

    def answer(question: Any) -> Any:
        golds = [parse(_as_mathematics(text), parsing_timeout=None) for text in question["references"]]
        target = parse(question["response"], parsing_timeout=None)
        equal = any(gold and verify(gold, target, timeout_seconds=None) for gold in golds)
        return {"readable": all(map(bool, golds)), "found": bool(target), "equal": bool(target) and equal}

    return answer


def _as_mathematics(reference: str) -> str:
    """Return the reference as an expression: in dollars if it has no math delimiters."""
    return reference if "$" in reference or "\\boxed" in reference or "\\[" in reference else f"${reference}$"


def json_schema_task(setup: Any) -> Answer:
    """Return a function that checks whether a response is JSON and whether the schema allows it."""
    from jsonschema.validators import validator_for
    from referencing import Registry

    validator = validator_for(setup)(setup, registry=Registry())

    def answer(response: Any) -> Any:
        try:
            value = json.loads(response, parse_constant=_no_constant)
            return {"parsed": True, "valid": validator.is_valid(value)}
        except (ValueError, RecursionError):
            return {"parsed": False, "valid": False}

    return answer


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


TASKS: dict[str, Callable[[Any], Answer]] = {"math": math_task, "json_schema": json_schema_task}


def main() -> None:
    """Answer questions from stdin until it ends."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    questions, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # a library's prints must not mix with answers
    answer = TASKS[sys.argv[1]](json.loads(questions.readline()))
    answers.write(b'{"answer": null}\n')
    for line in questions:
        signal.setitimer(signal.ITIMER_REAL, float(sys.argv[2]))  # ends this process if the parent died
        try:
            reply = {"answer": answer(json.loads(line))}
        except Exception as error:  # noqa: BLE001 not swallowed: it becomes the item's RewardError
            reply = {"error": f"{type(error).__name__}: {error}"[:500]}
        signal.setitimer(signal.ITIMER_REAL, 0)
        answers.write(json.dumps(reply).encode() + b"\n")


if __name__ == "__main__":
    main()
