"""PPO reaches the known optimum on one-token responses with fixed rewards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.trajectory import Segment, Trajectory, Turn
from learner.config import LearnerConfig
from learner.model.packing import make_pack
from tests.learner.conftest import VOCABULARY, write_policy
from tests.learner.ppo.test_rllib import OneRank

PROMPT = [3, 1, 4]
BETA, NUM_STEPS, BATCH = 0.5, 50, 512
REWARDS = torch.sin(torch.arange(VOCABULARY, dtype=torch.float64))


def distribution(learner: OneRank) -> torch.Tensor:
    """Compute pi(a) of every token after the prompt."""
    with torch.no_grad():
        pack = make_pack([len(PROMPT)], torch.device("cpu"))
        logits = learner.model.policy(input_ids=torch.tensor([PROMPT]), pack=pack).logits[0, -1] / 0.7
    return logits.double().softmax(-1)


def sampled(policy: torch.Tensor, step: int, generator: torch.Generator) -> list[Trajectory]:
    actions = torch.multinomial(policy, BATCH, replacement=True, generator=generator).tolist()
    logprobs = policy.log()
    return [
        Trajectory(
            uid=f"{step}-{index}",
            group=index // 4,
            task="bandit",
            token_ids=[*PROMPT, action],
            mask=[False, False, False, True],
            behavior_logprobs=[0.0, 0.0, 0.0, float(logprobs[action])],
            segments=[Segment(step - 1, 3, 1, 0, "bandit")],
            turns=[Turn(3, 1)],
            admission_index=index,
            finish_reason="stop",
            reward=float(REWARDS[action]),
        )
        for index, action in enumerate(actions)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"kl_in": "loss", "kl_estimator": "k2"}, {"advantages": "rloo"}])
def test_the_policy_reaches_the_closed_form_optimum(tmp_path: Path, changes: dict[str, Any]) -> None:
    """pi_ref(a) exp(r(a) / beta) / Z, within 2 % total variation."""
    settings = {"num_epochs": 2, "num_minibatches": 2, "learning_rate": 5e-3, "learning_rate_schedule": "linear"}
    config = LearnerConfig(
        **{**settings, "num_steps": NUM_STEPS, "kl_coefficient": BETA, "whiten_advantages": False, **changes}
    )
    learner, generator = OneRank(write_policy(tmp_path / "policy"), config), torch.Generator().manual_seed(0)
    start = distribution(learner)
    optimum = start * (REWARDS / BETA).exp()
    optimum /= optimum.sum()
    for step in range(1, NUM_STEPS + 1):
        learner.step(step, sampled(distribution(learner), step, generator))
    distance = float((distribution(learner) - optimum).abs().sum() / 2)
    assert float((start - optimum).abs().sum() / 2) > 0.3
    assert distance < 0.02, distance
