"""Held-out evaluation: during PPO for the best checkpoint, at the end for the table before and after.

All generation goes through a rollout actor's engine; the KL to the reference is the engine's own log-probabilities
of the responses against those of the reference weights in the same engine.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from cluster import user_code
from cluster.errors import RewardError
from cluster.scoring import Score
from cluster.trajectory import Segment, Trajectory
from deploy import judged
from deploy.columns import columns_for
from deploy.config.schema import EvaluationConfig, Way
from deploy.data.adversarial import way_of
from deploy.data.prompts import prompt_rows
from deploy.judged import Answer
from deploy.reward_watch import pauses_said
from deploy.run.artifacts import data_path, policy_path
from deploy.run.layout import EVALUATION
from deploy.session import Session
from rollout_actors.conversations.conversation import Conversation, score_request

if TYPE_CHECKING:
    from deploy.healing import HealedLearners

NUM_SHOWN = 5
OF_PLAIN_PROMPTS = ("reward_low", "reward_high", "kl_nats", "distinct")
"""What is not told of altered prompts."""


@dataclass(frozen=True, slots=True)
class Evaluated:
    """The answers of one policy to the held-out prompts, with what was measured on them; on each task's apart."""

    answers: list[Answer]
    metrics: dict[str, float]
    of_tasks: dict[str, dict[str, float]] = field(default_factory=dict)

    def of(self, task: str) -> dict[str, float]:
        """What was measured on a task; '' is the only one of a run that names none."""
        return self.of_tasks[task] if task else self.metrics

    def summary(self) -> dict[str, float]:
        """All that was measured, by the dotted keys of summary.json."""
        of_tasks = {f"tasks.{task}.{key}": value for task, of in self.of_tasks.items() for key, value in of.items()}
        return {**self.metrics, **of_tasks}


async def held_out_rows(session: Session, num: int, task: str, *, altered: bool = False) -> list[dict[str, Any]]:
    """The first `num` rows of a task's evaluation data (of the training prompts, where it brings no others).

    Where they are `altered`, each prompt is, as the task's `adversarial` says.
    """
    config, run = session.config, session.run
    path = data_path(config, run.path, "evaluation", task)
    name = "evaluation" if path.exists() else "prompts"
    rows = await prompt_rows(session, name, task, altered_share=1.0 if altered else 0.0)
    return [rows[i % len(rows)] for i in range(num)]


class HeldOut:
    """Evaluation during PPO: mean reward and KL of the newest version on a few held-out prompts of each task."""

    def __init__(self, session: Session, learners: HealedLearners) -> None:
        self._session = session
        self._learners = learners
        self._constraint = session.config.learner.constraint
        self._rows: dict[str, list[dict[str, Any]]] = {}

    async def evaluate(self, step: int) -> bool:
        """Measure version `step`; whether its reward - kl_coefficient x KL is the highest so far.

        Where there is a bound on the cost, a version that keeps it comes before any that does not. Of several tasks
        each counts the same.
        """
        of_tasks = {task: await self._measured(step, task) for task in self._session.config.by_task()}
        names = next(iter(of_tasks.values()))
        metrics = {"step": step, **{name: fmean(of[name] for of in of_tasks.values()) for name in names}}
        for task, of in of_tasks.items():
            metrics |= {f"tasks/{task}/{name}": value for name, value in of.items() if task}
        self._session.record("held_out", metrics)
        return self._is_best(metrics)

    async def _measured(self, step: int, task: str) -> dict[str, float]:
        """What is measured of version `step` on one task."""
        session, config = self._session, self._session.config
        if task not in self._rows:
            self._rows[task] = await held_out_rows(session, config.evaluation.num_prompts_during, task)
        rows = self._rows[task]
        answered = await session.pool.ask(
            "answer",
            rows,
            task=config.recorded_as(task),
            num=1,
            seed=f"{config.run.seed}-held-out",
            temperature=config.rollout_actors.temperature,
            min_policy_version=step,
        )
        conversations = [group[0] for group in answered]
        scores = await score(session, task, rows, conversations)
        records = [
            _record(i, step, conversation, score.reward)
            for i, (conversation, score) in enumerate(zip(conversations, scores, strict=True))
        ]
        kl_nats, reward_mean = fmean(await self._learners.reference_kl(records)), fmean(s.reward for s in scores)
        objective = reward_mean - config.learner.kl_coefficient * kl_nats
        cost = self._constraint.cost
        costs = {} if cost is None else {"cost_mean": _mean_cost(scores, cost)}
        return {"reward_mean": reward_mean, "kl_nats": kl_nats, "objective": objective, **costs}

    def _is_best(self, metrics: dict[str, float]) -> bool:
        best = self._session.run.summary().get("held_out")
        if best is not None and self._standing(metrics) <= self._standing(best):
            return False
        found = {f"held_out.{name.replace('/', '.')}": value for name, value in metrics.items()}
        self._session.run.update_summary(found)
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
    tasks, num = config.by_task(), config.evaluation.num_prompts
    rows = {name: await held_out_rows(session, num, name) for name in tasks}
    harder = {
        name: await held_out_rows(session, num, name, altered=True)
        for name, task in tasks.items()
        if task.adversarial.ways
    }
    session.view.stage("evaluation", 2)
    reference = policy_path(config, run.path)
    policies = {"before": reference, "after": run.path / "policy"}
    evaluated = {}
    for name, path in policies.items():
        if path.exists():
            evaluated[name] = await _evaluate_policy(session, rows, path, reference)
            judged.write(run.path / EVALUATION / f"{name}.parquet", evaluated[name].answers)
            if harder:
                answers = await _evaluate_altered(session, harder, path, reference, evaluated[name])
                judged.write(run.path / EVALUATION / f"{name}_adversarial.parquet", answers)
            run.update_summary({f"evaluation.{name}.{key}": value for key, value in evaluated[name].summary().items()})
    if len(evaluated) == len(policies):
        _say_changes(session, evaluated["before"].answers, evaluated["after"].answers)


def _say_changes(session: Session, before: Sequence[Answer], after: Sequence[Answer]) -> None:
    """What PPO changed, into the summary and onto the screen, with a few answers to read."""
    tasks = session.config.by_task()
    changes = {"evaluation.change": judged.compared(after, before, EVALUATION)[0]}
    for task in filter(None, tasks):
        new, old = (judged.of_task(answers, task) for answers in (after, before))
        changes[f"evaluation.change.tasks.{task}"] = judged.compared(new, old, EVALUATION)[0]
    for where, change in changes.items():
        session.run.update_summary({f"{where}.{key}": value for key, value in change._asdict().items()})
    summary, num_shown = session.run.summary()[EVALUATION], max(1, NUM_SHOWN // len(tasks))
    session.view.evaluated(summary["before"], summary["after"])
    old, new = ([a for a in answers if a.sample == 0 and a.row < num_shown] for answers in (before, after))
    session.view.responses([a.prompt for a in new], [a.response for a in old], [a.response for a in new])


async def _evaluate_altered(
    session: Session, rows: Mapping[str, Sequence[dict[str, Any]]], policy: Path, reference: Path, plain: Evaluated
) -> list[Answer]:
    """A policy's answers to altered prompts; what was measured on `plain` ones is told beside what was on these."""
    answers = list[Answer]()
    for task, own in rows.items():
        altered = await _evaluate_task(session, task, own, policy, reference)
        ways = session.config.by_task()[task].adversarial.ways
        plain.of(task).update(robustness(plain.of(task), altered, ways))
        answers += altered.answers
    return answers


def robustness(plain: Mapping[str, float], altered: Evaluated, ways: Sequence[Way]) -> dict[str, float]:
    """What was measured on altered prompts, the reward by the way in which they are, and what altering them costs."""
    by_way: dict[Way, list[float]] = {}
    for answer in altered.answers:
        if answer.sample != judged.GREEDY:
            by_way.setdefault(way_of(answer.row, ways), []).append(answer.reward)
    return {
        **{f"adversarial_{key}": value for key, value in altered.metrics.items() if key not in OF_PLAIN_PROMPTS},
        **{f"adversarial_reward_{way}": fmean(rewards) for way, rewards in by_way.items()},
        "adversarial_drop": plain["reward"] - altered.metrics["reward"],
    }


async def _evaluate_policy(
    session: Session, rows: Mapping[str, Sequence[dict[str, Any]]], policy: Path, reference: Path
) -> Evaluated:
    """A policy's answers in every task; of several tasks each counts the same."""
    found = [await _evaluate_task(session, task, own, policy, reference) for task, own in rows.items()]
    if not session.config.tasks:
        return found[0]
    answers = [answer for of_task in found for answer in of_task.answers]
    metrics = _measured([a for a in answers if a.sample != judged.GREEDY], session.config.evaluation)
    if session.config.learner.constraint.cost is not None:
        metrics["cost"] = fmean(of_task.metrics["cost"] for of_task in found)
    of_tasks = dict(zip(rows, (of_task.metrics for of_task in found), strict=True))
    return Evaluated(answers, metrics, of_tasks)


async def _evaluate_task(
    session: Session, task: str, rows: Sequence[dict[str, Any]], policy: Path, reference: Path
) -> Evaluated:
    settings, path = session.config.evaluation, session.config.by_task()[task].metrics
    seed = f"{session.config.run.seed}-evaluation"
    drawn = await session.answer(rows, policy, task=task, num=settings.num_samples, seed=seed)
    conversations = [conversation for group in drawn for conversation in group]
    asked = [row for row in rows for _ in range(settings.num_samples)]
    logprobs = [await session.logprobs([c.token_ids for c in conversations], each) for each in (policy, reference)]
    kl_nats = [sum(p) - sum(r) for p, r in zip(*(_sampled(v, conversations) for v in logprobs), strict=True)]
    scores = await score(session, task, asked, conversations)
    answers = [
        _answer(task, place // settings.num_samples, place % settings.num_samples, *of)
        for place, of in enumerate(zip(conversations, scores, kl_nats, strict=True))
    ]
    metrics = _measured(answers, settings) | _of_environment(conversations)
    cost = session.config.learner.constraint.cost
    if cost is not None:
        metrics["cost"] = _mean_cost(scores, cost)
    if path:
        metrics |= measure(
            path,
            [_with_conversation(*p) for p in zip(asked, conversations, strict=True)],
            [c.response for c in conversations],
            key=session.config.key_of(task, "metrics"),
        )
    if settings.greedy:
        answers += await _greedy(session, task, rows, policy)
        metrics["reward_greedy"] = fmean(answer.reward for answer in answers if answer.sample == judged.GREEDY)
    return Evaluated(answers, metrics)


async def _greedy(session: Session, task: str, rows: Sequence[dict[str, Any]], policy: Path) -> list[Answer]:
    chosen = await session.answer(rows, policy, task=task, num=1, seed="greedy", temperature=0.0)
    conversations = [group[0] for group in chosen]
    scores = await score(session, task, rows, conversations)
    return [_answer(task, i, judged.GREEDY, *of, 0.0) for i, of in enumerate(zip(conversations, scores, strict=True))]


def _answer(task: str, row: int, sample: int, conversation: Conversation, score: Score, kl_nats: float) -> Answer:
    told = (asked(conversation), shown(conversation), score.reward, kl_nats, conversation.parts)
    return Answer(row, sample, *told, task=task)


def _with_conversation(row: Mapping[str, Any], conversation: Conversation) -> dict[str, Any]:
    return {**row, "conversation": conversation.messages} if conversation.messages else dict(row)


def _measured(answers: Sequence[Answer], settings: EvaluationConfig) -> dict[str, float]:
    """Means over all answers, with the reward's bounds over prompts."""
    interval = judged.reward_interval(answers)
    return {
        "reward": interval.mean,
        "reward_low": interval.low,
        "reward_high": interval.high,
        "kl_nats": fmean(answer.kl_nats for answer in answers),
        "distinct": len({answer.response for answer in answers}) / len(answers),
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


def measure(
    path: str, rows: Sequence[Mapping[str, Any]], responses: Sequence[str], *, key: str = "evaluation.metrics"
) -> dict[str, float]:
    """What the metrics function at that dotted path says of the responses; it gets the rows' columns that it takes.

    `key` is what names it in the run file.
    """
    function = user_code.load(path, key)
    columns = columns_for(function, rows, key, num_texts=2)
    measured: dict[str, float] = function([row["prompt"] for row in rows], list(responses), **columns)
    return measured


def _sampled(logprobs: Sequence[Sequence[float]], conversations: Sequence[Conversation]) -> list[list[float]]:
    """Of each sequence's log-probabilities, the first token's left out, those of what the policy sampled."""
    return [
        [value for value, is_sampled in zip(values, conversation.mask[1:], strict=True) if is_sampled]
        for values, conversation in zip(logprobs, conversations, strict=True)
    ]
