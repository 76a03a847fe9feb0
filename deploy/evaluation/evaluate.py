"""Held-out evaluation: during PPO for the best checkpoint, at the end for the table before and after.

All generation goes through a rollout actor's engine; the KL to the reference is the engine's own log-probabilities
of the responses against those of the reference weights in the same engine.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from cluster import user_code
from cluster.scoring import Score
from deploy.config.schema import EvaluationConfig, Way
from deploy.data.adversarial import way_of
from deploy.evaluation import answers as judged
from deploy.evaluation.answers import Answer
from deploy.evaluation.columns import columns_for
from deploy.evaluation.scoring import held_out_rows, mean_cost, score
from deploy.run.artifacts import policy_path
from deploy.run.layout import EVALUATION
from deploy.runtime.pauses import pauses_said
from deploy.runtime.session import Session
from rollout_actors.conversations.conversation import Conversation

if TYPE_CHECKING:
    pass

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
        metrics["cost"] = mean_cost(scores, cost)
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
