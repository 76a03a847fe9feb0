"""Script of a worker process: one task, first its setup, then one question per line.

Imports no package of Antiphon.

`math`: is a response equal to a reference? `json_schema`: is a response JSON that the schema allows?
"""

from __future__ import annotations

import json
import logging
import os
import re
import resource
import signal
import sys
import unicodedata
from collections.abc import Callable
from typing import Any

MEMORY_BYTES = 2 << 30
Answer = Callable[[Any], Any]


def math_task(setup: Any) -> Answer:
    """Return a function that compares {"references", "response"} with math-verify.

    Its answer says whether all references and the response have an expression, and whether one is equal. math-verify's
    timeouts are off: the kernel ends this process.
    """
    from math_verify import parse, verify

    logging.disable(logging.CRITICAL)

    def answer(question: Any) -> Any:
        golds = [parse(_as_mathematics(_in_ascii(text)), parsing_timeout=None) for text in question["references"]]
        target = parse(_last_boxed(_in_ascii(question["response"])), parsing_timeout=None)
        equal = any(gold and verify(gold, target, timeout_seconds=None) for gold in golds)
        return {"readable": all(map(bool, golds)), "found": bool(target), "equal": bool(target) and equal}

    return answer


def _in_ascii(text: str) -> str:
    """Return the text with the signs, digits, spaces and fractions that math-verify reads in place of Unicode's."""
    text = "".join(_spelled(character) for character in text)
    return re.sub(r"(?<=\d)(?:[\u00a0\u202f\u2009\u2007]|\\,|\{,\})(?=\d{3}(?!\d))", "", text)


def _spelled(character: str) -> str:
    if character in "−﹣－":
        return "-"
    decomposition = unicodedata.decomposition(character)
    if decomposition.startswith("<super>") and character in "⁰¹²³⁴⁵⁶⁷⁸⁹":
        return f"^{{{unicodedata.digit(character)}}}"
    if decomposition.startswith("<fraction>"):
        return " " + unicodedata.normalize("NFKC", character).replace("⁄", "/")
    if character.isdecimal() and not character.isascii():
        return str(unicodedata.decimal(character))
    return character


def _last_boxed(response: str) -> str:
    r"""Return the last whole \boxed{...} of a response, or the response if it has none."""
    for start in reversed([match.start() for match in re.finditer(r"\\(?:boxed|fbox)\s*\{", response)]):
        depth = 0
        for end in range(response.index("{", start), len(response)):
            depth += {"{": 1, "}": -1}.get(response[end], 0)
            if not depth:
                return f"${response[start : end + 1]}$"
    return response


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
        signal.setitimer(signal.ITIMER_PROF, float(sys.argv[2]))  # ends this process when its CPU time is used up
        signal.setitimer(signal.ITIMER_REAL, float(sys.argv[3]))  # ends this process if the parent died
        try:
            reply: dict[str, Any] = {"answer": answer(json.loads(line))}
        except (MemoryError, RecursionError):  # the text needs more than this process may use
            reply = {"answer": None}
        except Exception as error:  # noqa: BLE001 not swallowed: it becomes the item's RewardError
            reply = {"error": f"{type(error).__name__}: {error}"[:500]}
        for timer in (signal.ITIMER_PROF, signal.ITIMER_REAL):
            signal.setitimer(timer, 0)
        answers.write(json.dumps(reply).encode() + b"\n")


if __name__ == "__main__":
    main()
