"""Score held-out responses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import TYPE_CHECKING, Any

from cluster.errors import RewardError
from cluster.scoring import Score
from deploy.data.prompts import prompt_rows
from deploy.run.artifacts import data_path
from deploy.runtime.session import Session
from rollout_actors.conversations.conversation import Conversation, score_request

if TYPE_CHECKING:
    pass


async def held_out_rows(session: Session, num: int, task: str, *, altered: bool = False) -> list[dict[str, Any]]:
    """The first `num` rows of a task's evaluation data (of the training prompts, where it brings no others).

    Where they are `altered`, each prompt is, as the task's `adversarial` says.
    """
    config, run = session.config, session.run
    path = data_path(config, run.path, "evaluation", task)
    name = "evaluation" if path.exists() else "prompts"
    rows = await prompt_rows(session, name, task, altered_share=1.0 if altered else 0.0)
    return [rows[i % len(rows)] for i in range(num)]


async def score(
    session: Session, task: str, rows: Sequence[Mapping[str, Any]], conversations: Sequence[Conversation]
) -> list[Score]:
    """What each is worth: the run's own reward service's rewards, and those that the environment gave turn by turn.

    The parts are the service's and the environment's.
    """
    requests = [
        replace(score_request(conversation, conversation.response, row, task=task), id=f"held-out-{i}")
        for i, (row, conversation) in enumerate(zip(rows, conversations, strict=True))
    ]
    scores = await (await session.rewards()).score(requests)
    return [
        replace(score, reward=score.reward + held.turn_rewards, parts={**held.parts, **score.parts})
        for score, held in zip(scores, conversations, strict=True)
    ]


def mean_cost(scores: Sequence[Score], part: str) -> float:
    """Of the part that is the cost. Raises RewardError naming an answer that has none."""
    for score in scores:
        if part not in score.parts:
            found = ", ".join(sorted(score.parts)) or "none"
            raise RewardError(
                "learner.constraint.cost", f"the reward of {score.id} has no part {part!r}: there are {found}"
            )
    return fmean(score.parts[part] for score in scores)
