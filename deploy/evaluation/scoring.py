"""Select held-out prompts and score the responses to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

from cluster.errors import RewardError
from cluster.scoring import Score, with_trainer_state
from deploy.data.prompts import prompt_rows, rendered_rows
from deploy.run.artifacts import data_path
from deploy.runtime.session import Session
from rollout_actors.conversations.conversation import Conversation, score_request


async def held_out_rows(session: Session, num: int, task: str, *, altered: bool = False) -> list[dict[str, Any]]:
    """Return the first `num` rows of a task's evaluation data, or of its training prompts if it has none.

    If `altered`, applies the task's `adversarial` settings to every prompt. Repeats rows if there are too few.
    """
    config, run = session.config, session.run
    path = data_path(config, run.path, "evaluation", task)
    name = "evaluation" if path.exists() else "prompts"
    rows = await prompt_rows(session, name, task, altered_share=1.0 if altered else 0.0)
    return await rendered_rows(session, [rows[i % len(rows)] for i in range(num)])


async def score(
    session: Session, task: str, rows: Sequence[Mapping[str, Any]], conversations: Sequence[Conversation]
) -> list[Score]:
    """Return a score for each conversation: the service's reward plus the environment's turn rewards.

    The parts of a score are those of the service and of the environment. A scorer that depends on the training step
    scores every policy as at the end of training, so that policies are comparable.
    """
    num_steps = session.config.learner.num_steps
    requests = [
        replace(
            with_trainer_state(
                score_request(conversation, conversation.response, row, task=task),
                global_step=num_steps,
                max_steps=num_steps,
            ),
            id=f"held-out-{i}",
        )
        for i, (row, conversation) in enumerate(zip(rows, conversations, strict=True))
    ]
    scores = await (await session.rewards()).score(requests)
    return [
        replace(score, reward=score.reward + conversation.turn_rewards, parts={**conversation.parts, **score.parts})
        for score, conversation in zip(scores, conversations, strict=True)
    ]


def mean_cost(scores: Sequence[Score], part: str) -> float:
    """Return the mean of the part that is the cost. Raises RewardError naming a score without it."""
    for score in scores:
        if part not in score.parts:
            found = ", ".join(sorted(score.parts)) or "none"
            message = f"the reward of {score.id} has no part {part!r}; its parts are {found}"
            raise RewardError("learner.constraint.cost", message)
    return fmean(score.parts[part] for score in scores)
