"""Rules that a worker process decides, because they may take for ever on a hostile text: mathematics, JSON Schema."""

from __future__ import annotations

import re
from typing import Any

from cluster.errors import RewardError
from cluster.scoring import ScoreRequest
from reward_service.config.scorers import JsonSchemaConfig, MathConfig
from reward_service.sandbox.worker import Workers
from reward_service.scorers.rules import Rule, Verdict, references_of

FENCED = re.compile(r"^```[^\n`]*\n(.*?)^```", re.DOTALL | re.MULTILINE)


def math_rule(config: MathConfig, workers: Workers) -> Rule:
    """1 where the response's last expression equals a reference. A reference without one is the item's error."""

    def rule(request: ScoreRequest) -> Verdict:
        question = {"references": list(map(str, references_of(request))), "response": request.response}
        answer = _ask(workers, question, config.timeout_s, request)
        if not answer["readable"]:
            raise RewardError("references", f"a reference of {request.id} has no expression that can be read")
        return float(answer["equal"]), {"found": float(answer["found"])}

    return rule


def json_schema_rule(config: JsonSchemaConfig, workers: Workers) -> Rule:
    """1 where the last fenced block, or the whole response, is JSON that the schema allows."""

    def rule(request: ScoreRequest) -> Verdict:
        answer = _ask(workers, last_block(request.response), config.timeout_s, request)
        return float(answer["valid"]), {"parsed": float(answer["parsed"])}

    return rule


def last_block(response: str) -> str:
    """What stands in the response's last block fenced by ```; all of it where there is none."""
    blocks = FENCED.findall(response)
    return blocks[-1] if blocks else response


def _ask(workers: Workers, question: Any, timeout_s: float, request: ScoreRequest) -> Any:
    try:
        return workers.ask(question)
    except TimeoutError:
        raise RewardError("worker", f"{request.id} took longer than {timeout_s:g} s") from None
    except RewardError as error:
        raise RewardError("worker", f"{error.what} (scoring {request.id})") from error
