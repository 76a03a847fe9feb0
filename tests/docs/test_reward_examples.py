"""Each reward function of the guide is called as a run calls it."""

from __future__ import annotations

import re
import textwrap
from typing import Any

import pytest

from cluster.scoring import ScoreRequest, with_trainer_state
from reward_service.functions.caller import FunctionCaller
from tests.support.paths import ROOT

GUIDE = (ROOT / "docs" / "guides" / "rewards.md").read_text()
BLOCKS = [textwrap.dedent(block) for block in re.findall(r"^ *```python\n(.*?)^ *```", GUIDE, re.DOTALL | re.MULTILINE)]
COLUMNS: dict[str, Any] = {
    "messages": [{"role": "user", "content": "what is 2+2?"}],
    "completion_ids": list(range(11)),
    "data_source": "openai/gsm8k",
    "reward_model": {"style": "rule", "ground_truth": "4"},
    "extra_info": {"index": 0},
    "references": ["4"],
    "labels": "4",
}
REQUEST = ScoreRequest("i", "what is 2+2? ", "please: #### 4", COLUMNS)
EXPECTED: dict[str, tuple[str, float, dict[str, float]]] = {
    "polite": ("ours", 1.0, {}),
    "close_to_20_words": ("trl", -0.85, {}),
    "long_enough": ("trl", 1.0, {"wanted_tokens": 11.0}),
    "compute_score": ("verl", 1.0, {"has_answer": 1.0}),
    "reward_func": ("openrlhf", 1.0, {"scores": 1.0, "words": 3.0}),
}


def functions() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for block in BLOCKS:
        names: dict[str, Any] = {}
        exec(block, names)
        found |= {
            name: value for name, value in names.items() if name in re.findall(r"^def (\w+)", block, re.MULTILINE)
        }
    return found


@pytest.mark.parametrize("name", EXPECTED)
def test_example_in_the_signature_of_a_trainer_scores(name: str) -> None:
    kind, reward, parts = EXPECTED[name]
    caller = FunctionCaller(functions()[name])
    (result,) = caller.results([with_trainer_state(REQUEST, global_step=10, max_steps=20)])
    assert (caller.kind, result.error, dict(result.parts)) == (kind, None, parts)
    assert result.reward == pytest.approx(reward)


def test_every_function_of_the_guide_is_tested() -> None:
    assert set(functions()) == set(EXPECTED)
