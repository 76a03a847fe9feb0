"""Held-out evaluation: during PPO for the best checkpoint, at the end for the table before and after.

All generation goes through a rollout actor's engine; the KL to the reference is the engine's own log-probabilities
of the responses against those of the reference weights in the same engine.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from cluster import dotted
from cluster.errors import RewardError
from cluster.scoring import Score
from cluster.trajectory import Segment, Trajectory
from deploy import judged
from deploy.adversarial import way_of
from deploy.columns import columns_for
from deploy.judged import Answer
from deploy.reward_watch import pauses_said
from deploy.run_directory import EVALUATION
from deploy.run_sections import EvaluationConfig, Way
from deploy.session import Session
from deploy.stages import data_path, policy_path, prompt_rows
from rollout_actors.conversation import Conversation, score_request

if TYPE_CHECKING:
    from deploy.healing import HealedLearners

NUM_SHOWN = 5
OF_PLAIN_PROMPTS = ("reward_low", "reward_high", "kl_nats", "distinct")
"""What is not told of altered prompts."""


@dataclass(frozen=True, slots=True)
class Evaluated:
    """The answers of one policy to the held-out prompts, with what was measured on them."""

    answers: list[Answer]
    metrics: dict[str, float]


async def held_out_rows(session: Session, num: int, *, altered: bool = False) -> list[dict[str, Any]]:
    """The first `num` rows of the evaluation data (of the training prompts, where a run brings no others).

    Where they are `altered`, each prompt is, as the run file's `adversarial` says.
    """
    config, run = session.config, session.run
    path = data_path(config, run.path, "evaluation")
    name = "evaluation" if path.exists() else "prompts"
    rows = await prompt_rows(session, name, altered_share=1.0 if altered else 0.0)
    return [rows[i % len(rows)] for i in range(num)]


class HeldOut:
    """Evaluation during PPO: mean reward and KL of the newest version on a few held-out prompts."""

    def __init__(self, session: Session, learners: HealedLearners) -> None:
        self._session = session
        self._learners = learners
        self._constraint = session.config.learner.constraint
        self._rows: list[dict[str, Any]] = []

    async def evaluate(self, step: int) -> bool:
        """Measure version `step`; whether its reward - kl_coefficient x KL is the highest so far.

        Where there is a bound on the cost, a version that keeps it comes before any that does not.
        """
        session = self._session
        settings = session.config.evaluation
        rows = self._rows = self._rows or await held_out_rows(session, settings.num_prompts_during)
        answered = await session.pool.ask(
            "answer",
            rows,
            num=1,
            seed=f"{session.config.run.seed}-held-out",
            temperature=session.config.rollout_actors.temperature,
            min_policy_version=step,
        )
        conversations = [group[0] for group in answered]
        scores = await score(session, rows, conversations)
        records = [
            _record(i, step, conversation, score.reward)
            for i, (conversation, score) in enumerate(zip(conversations, scores, strict=True))
        ]
        kl_nats = fmean(await self._learners.reference_kl(records))
        reward_mean = fmean(score.reward for score in scores)
        objective = reward_mean - session.config.learner.kl_coefficient * kl_nats
        metrics = {"step": step, "reward_mean": reward_mean, "kl_nats": kl_nats, "objective": objective}
        if self._constraint.cost is not None:
            metrics["cost_mean"] = _mean_cost(scores, self._constraint.cost)
        session.record("held_out", metrics)
        return self._is_best(metrics)

    def _is_best(self, metrics: dict[str, float]) -> bool:
        best = self._session.run.summary().get("held_out")
        if best is not None and self._standing(metrics) <= self._standing(best):
            return False
        self._session.run.update_summary({f"held_out.{name}": value for name, value in metrics.items()})
        return True

    def _standing(self, metrics: Mapping[str, float]) -> tuple[float, float]:
        """What is compared first, and then: how far it is beyond the bound on the cost, and the objective."""
        beyond = 0.0 if self._constraint.cost is None else metrics["cost_mean"] - self._constraint.max_mean
        return -max(0.0, beyond), metrics["objective"]


def _record(index: int, version: int, conversation: Conversation, reward: float) -> Trajectory:
    """A held-out conversation as the learners read it; it is never trained on."""
    return Trajectory(
        uid=f"held-out-{index}",
        group=0,
        task="held-out",
        token_ids=conversation.token_ids,
        mask=conversation.mask,
        behavior_logprobs=conversation.logprobs,
        segments=[Segment(version, turn.start, turn.length, 0, "held-out") for turn in conversation.turns],
        turns=conversation.turns,
        admission_index=0,
        finish_reason="stop",
        reward=reward,
    )


async def score(
    session: Session, rows: Sequence[Mapping[str, Any]], conversations: Sequence[Conversation]
) -> list[Score]:
    """What each is worth: the run's own reward service's rewards, and those that the environment gave turn by turn.

    The parts are the service's and the environment's.
    """
    requests = [
        replace(score_request(conversation, conversation.response, row), id=f"held-out-{i}")
        for i, (row, conversation) in enumerate(zip(rows, conversations, strict=True))
    ]
    scores = await (await session.rewards()).score(requests)
    return [
        replace(score, reward=score.reward + held.turn_rewards, parts={**held.parts, **score.parts})
        for score, held in zip(scores, conversations, strict=True)
    ]


def _mean_cost(scores: Sequence[Score], part: str) -> float:
    """Of the part that is the cost. Raises RewardError naming an answer that has none."""
    for score in scores:
        if part not in score.parts:
            found = ", ".join(sorted(score.parts)) or "none"
            raise RewardError(
                "learner.constraint.cost", f"the reward of {score.id} has no part {part!r}: there are {found}"
            )
    return fmean(score.parts[part] for score in scores)


async def evaluate(session: Session) -> None:
    """The policy before and after PPO on the held-out prompts, into `summary.json` and onto the screen."""
    async with pauses_said(session.missing_rewards, session.view.note):
        await _evaluate(session)


async def _evaluate(session: Session) -> None:
    config, run = session.config, session.run
    rows = await held_out_rows(session, config.evaluation.num_prompts)
    harder = await held_out_rows(session, len(rows), altered=True) if config.adversarial.ways else []
    session.view.stage("evaluation", 2)
    reference = policy_path(config, run.path)
    policies = {"before": reference, "after": run.path / "policy"}
    evaluated = {}
    for name, path in policies.items():
        if path.exists():
            evaluated[name] = await _evaluate_policy(session, rows, path, reference)
            judged.write(run.path / EVALUATION / f"{name}.parquet", evaluated[name].answers)
            if harder:
                altered = await _evaluate_policy(session, harder, path, reference)
                judged.write(run.path / EVALUATION / f"{name}_adversarial.parquet", altered.answers)
                evaluated[name].metrics.update(robustness(evaluated[name], altered, config.adversarial.ways))
            run.update_summary({f"evaluation.{name}.{key}": value for key, value in evaluated[name].metrics.items()})
    if len(evaluated) == len(policies):
        before, after = evaluated["before"], evaluated["after"]
        difference, _ = judged.compared(after.answers, before.answers, EVALUATION)
        run.update_summary({f"evaluation.change.{key}": value for key, value in difference._asdict().items()})
        session.view.table_before_after(before.metrics, after.metrics)
        old, new = ([answer for answer in e.answers if answer.sample == 0][:NUM_SHOWN] for e in (before, after))
        session.view.responses([a.prompt for a in new], [a.response for a in old], [a.response for a in new])


def robustness(plain: Evaluated, altered: Evaluated, ways: Sequence[Way]) -> dict[str, float]:
    """What was measured on altered prompts, the reward by the way in which they are, and what altering them costs."""
    by_way: dict[Way, list[float]] = {}
    for answer in altered.answers:
        if answer.sample != judged.GREEDY:
            by_way.setdefault(way_of(answer.row, ways), []).append(answer.reward)
    return {
        **{f"adversarial_{key}": value for key, value in altered.metrics.items() if key not in OF_PLAIN_PROMPTS},
        **{f"adversarial_reward_{way}": fmean(rewards) for way, rewards in by_way.items()},
        "adversarial_drop": plain.metrics["reward"] - altered.metrics["reward"],
    }


async def _evaluate_policy(
    session: Session, rows: Sequence[dict[str, Any]], policy: Path, reference: Path
) -> Evaluated:
    settings = session.config.evaluation
    drawn = await session.answer(rows, policy, num=settings.num_samples, seed=f"{session.config.run.seed}-evaluation")
    conversations = [conversation for group in drawn for conversation in group]
    asked = [row for row in rows for _ in range(settings.num_samples)]
    logprobs = [await session.logprobs([c.token_ids for c in conversations], path) for path in (policy, reference)]
    kl_nats = [sum(p) - sum(r) for p, r in zip(*(_sampled(v, conversations) for v in logprobs), strict=True)]
    scores = await score(session, asked, conversations)
    answers = [
        _answer(place // settings.num_samples, place % settings.num_samples, *of)
        for place, of in enumerate(zip(conversations, scores, kl_nats, strict=True))
    ]
    metrics, cost = _measured(answers, settings, conversations), session.config.learner.constraint.cost
    if cost is not None:
        metrics["cost"] = _mean_cost(scores, cost)
    if settings.metrics:
        metrics |= measure(
            settings.metrics,
            [_with_conversation(*p) for p in zip(asked, conversations, strict=True)],
            [c.response for c in conversations],
        )
    if settings.greedy:
        answers += await _greedy(session, rows, policy)
        metrics["reward_greedy"] = fmean(answer.reward for answer in answers if answer.sample == judged.GREEDY)
    return Evaluated(answers, metrics)


async def _greedy(session: Session, rows: Sequence[dict[str, Any]], policy: Path) -> list[Answer]:
    chosen = await session.answer(rows, policy, num=1, seed="greedy", temperature=0.0)
    conversations = [group[0] for group in chosen]
    scores = await score(session, rows, conversations)
    return [_answer(i, judged.GREEDY, *of, 0.0) for i, of in enumerate(zip(conversations, scores, strict=True))]


def _answer(row: int, sample: int, conversation: Conversation, score: Score, kl_nats: float) -> Answer:
    return Answer(row, sample, asked(conversation), shown(conversation), score.reward, kl_nats, conversation.parts)


def _with_conversation(row: Mapping[str, Any], conversation: Conversation) -> dict[str, Any]:
    return {**row, "conversation": conversation.messages} if conversation.messages else dict(row)


def _measured(
    answers: Sequence[Answer], settings: EvaluationConfig, conversations: Sequence[Conversation]
) -> dict[str, float]:
    """Means over all answers, with the reward's bounds over prompts."""
    interval = judged.reward_interval(answers)
    return {
        "reward": interval.mean,
        "reward_low": interval.low,
        "reward_high": interval.high,
        "kl_nats": fmean(answer.kl_nats for answer in answers),
        "distinct": len({answer.response for answer in answers}) / len(answers),
        **_of_environment(conversations),
        **({} if settings.pass_reward is None else judged.passed(answers, settings.pass_reward)),
    }


def _of_environment(conversations: Sequence[Conversation]) -> dict[str, float]:
    """Mean number of turns, and the means of what the environment said in `info`, of those where it did."""
    if not any(conversation.messages for conversation in conversations):
        return {}
    names = sorted({name for conversation in conversations for name in conversation.parts})
    means = {name: fmean(c.parts[name] for c in conversations if name in c.parts) for name in names}
    return {"num_turns": fmean(len(conversation.turns) for conversation in conversations), **means}


def asked(conversation: Conversation) -> str:
    """What a person reads of its beginning: the prompt, or all that was said before the first response."""
    if not conversation.messages:
        return conversation.prompt
    before = itertools.takewhile(lambda message: message["role"] != "assistant", conversation.messages)
    return "\n".join(message["content"] for message in before)


def shown(conversation: Conversation) -> str:
    """What a person reads of it: the response, or all that was said after the beginning."""
    if not conversation.messages:
        return conversation.response
    first = next(i for i, message in enumerate(conversation.messages) if message["role"] == "assistant")
    return "\n".join(f"{message['role']}: {message['content']}" for message in conversation.messages[first:])


def measure(path: str, rows: Sequence[Mapping[str, Any]], responses: Sequence[str]) -> dict[str, float]:
    """What the metrics function at that dotted path says of the responses; it gets the rows' columns that it takes."""
    function = dotted.load(path, "evaluation.metrics")
    columns = columns_for(function, rows, "evaluation.metrics", num_texts=2)
    measured: dict[str, float] = function([row["prompt"] for row in rows], list(responses), **columns)
    return measured


def _sampled(logprobs: Sequence[Sequence[float]], conversations: Sequence[Conversation]) -> list[list[float]]:
    """Of each sequence's log-probabilities, the first token's left out, those of what the policy sampled."""
    return [
        [value for value, is_sampled in zip(values, conversation.mask[1:], strict=True) if is_sampled]
        for values, conversation in zip(logprobs, conversations, strict=True)
    ]
