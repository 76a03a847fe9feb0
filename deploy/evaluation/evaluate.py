"""Evaluate the policies before and after the last training stage, or a single policy, on held-out prompts.

Rollout actors sample all responses. The KL to the reference policy is the difference of the log-probabilities that the
engine computes with both sets of weights.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from cluster import user_code
from cluster.scoring import Score
from deploy.config.schema import EvaluationConfig, Way
from deploy.data.adversarial import way_of
from deploy.evaluation.answers import GREEDY, Answer, compare, of_task, pass_rates, reward_interval, write
from deploy.evaluation.columns import columns_for
from deploy.evaluation.scoring import held_out_rows, mean_cost, score
from deploy.run.artifacts import policy_path, trained_policies
from deploy.run.layout import EVALUATION
from deploy.runtime.pauses import pauses_said
from deploy.runtime.session import Session
from rollout_actors.conversations.conversation import Conversation

NUM_SHOWN = 5
PLAIN_PROMPTS_ONLY = ("reward_low", "reward_high", "kl_nats", "distinct")
"""Metrics that are not reported for adversarial prompts."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """One sampled conversation of a row; `sample` is its number among the row's samples, or GREEDY."""

    index: int
    row: Mapping[str, Any]
    sample: int
    conversation: Conversation


@dataclass(frozen=True, slots=True)
class Evaluated:
    """The answers of one policy to the held-out prompts, with metrics over all tasks and of each."""

    answers: list[Answer]
    metrics: dict[str, float]
    by_task: dict[str, dict[str, float]] = field(default_factory=dict)

    def metrics_of(self, task: str) -> dict[str, float]:
        """Return the metrics of a task; '' is the only task of a run without named tasks."""
        return self.by_task[task] if task else self.metrics

    def summary(self) -> dict[tuple[str, ...], float]:
        """Return all metrics by their keys in summary.json; a metric's name may hold dots."""
        summary: dict[tuple[str, ...], float] = {(key,): value for key, value in self.metrics.items()}
        for task, own in self.by_task.items():
            summary |= {("tasks", task, key): value for key, value in own.items()}
        return summary


async def evaluate(session: Session) -> None:
    """Evaluate the policy before and after the last stage that trained one; the only policy if none did.

    Writes the result to summary.json and prints it. The KL is to the policy before.
    """
    before, after, stage = trained_policies(session.config, session.run.path)
    policies = {"after": after} if before is None else {"before": before, "after": after}
    async with pauses_said(session.missing_rewards, session.view.note):
        evaluated = await _evaluate_all(session, policies, before or after)
    if before is not None:
        _report_changes(session, evaluated["before"].answers, evaluated["after"].answers, stage)
    else:
        session.view.evaluated({}, session.run.summary()[EVALUATION]["after"])


async def evaluate_one(session: Session, *, name: str, policy: Path) -> None:
    """Evaluate one policy; writes its answers and metrics under `name`.

    The KL is to the policy that PPO starts from.
    """
    reference = policy_path(session.config, session.run.path)
    async with pauses_said(session.missing_rewards, session.view.note):
        await _evaluate_all(session, {name: policy}, reference)
    session.view.evaluated({}, session.run.summary()[EVALUATION][name])


async def _evaluate_all(session: Session, policies: Mapping[str, Path], reference: Path) -> dict[str, Evaluated]:
    """Evaluate policies on plain and adversarial prompts; writes answers and metrics under their names."""
    config, run = session.config, session.run
    tasks, num = config.by_task(), config.evaluation.num_prompts
    rows = {name: await held_out_rows(session, num, name) for name in tasks}
    altered_rows = {
        name: await held_out_rows(session, num, name, altered=True)
        for name, task in tasks.items()
        if task.adversarial.ways
    }
    session.view.stage("evaluation", len(policies))
    evaluated = {}
    for name, path in policies.items():
        evaluated[name] = await _evaluate_policy(session, rows, path, reference)
        write(run.path / EVALUATION / f"{name}.parquet", evaluated[name].answers)
        if altered_rows:
            answers = await _evaluate_altered(session, altered_rows, path, reference, evaluated[name])
            write(run.path / EVALUATION / f"{name}_adversarial.parquet", answers)
        run.update_summary({(EVALUATION, name, *key): v for key, v in evaluated[name].summary().items()})
    return evaluated


def _report_changes(session: Session, before: Sequence[Answer], after: Sequence[Answer], stage: str) -> None:
    """Write the changes by a stage to the summary and print them, with a few responses to read."""
    tasks = session.config.by_task()
    changes = {"evaluation.change": compare(after, before, EVALUATION)[0]}
    for task in filter(None, tasks):
        changes[f"evaluation.change.tasks.{task}"] = compare(of_task(after, task), of_task(before, task), EVALUATION)[0]
    for key, change in changes.items():
        session.run.update_summary({f"{key}.{name}": value for name, value in change._asdict().items()})
    summary, num_shown = session.run.summary()[EVALUATION], max(1, NUM_SHOWN // len(tasks))
    session.view.evaluated(summary["before"], summary["after"], stage=stage)
    old, new = ([a for a in answers if a.sample == 0 and a.row < num_shown] for answers in (before, after))
    session.view.responses([a.shown_prompt for a in new], [a.response for a in old], [a.response for a in new])


async def _evaluate_altered(
    session: Session, rows: Mapping[str, Sequence[dict[str, Any]]], policy: Path, reference: Path, plain: Evaluated
) -> list[Answer]:
    """Return a policy's answers to adversarial prompts; adds their metrics to those of `plain`."""
    answers = list[Answer]()
    for task, own in rows.items():
        altered = await _evaluate_task(session, task, own, policy, reference)
        ways = session.config.by_task()[task].adversarial.ways
        metrics = plain.metrics_of(task)
        metrics.update(robustness(metrics, altered, ways))
        answers += altered.answers
    return answers


def robustness(plain: Mapping[str, float], altered: Evaluated, ways: Sequence[Way]) -> dict[str, float]:
    """Return the metrics on adversarial prompts, the reward by way, and the drop of the reward."""
    by_way: dict[Way, list[float]] = {}
    for answer in altered.answers:
        if answer.sample != GREEDY:
            by_way.setdefault(way_of(answer.row, ways), []).append(answer.reward)
    return {
        **{f"adversarial_{key}": value for key, value in altered.metrics.items() if key not in PLAIN_PROMPTS_ONLY},
        **{f"adversarial_reward_{way}": fmean(rewards) for way, rewards in by_way.items()},
        "adversarial_drop": plain["reward"] - altered.metrics["reward"],
    }


async def _evaluate_policy(
    session: Session, rows: Mapping[str, Sequence[dict[str, Any]]], policy: Path, reference: Path
) -> Evaluated:
    """Evaluate a policy on every task; all tasks have the same weight."""
    found = [await _evaluate_task(session, task, own, policy, reference) for task, own in rows.items()]
    if not session.config.tasks:
        return found[0]
    answers = [answer for own in found for answer in own.answers]
    metrics = _metrics([a for a in answers if a.sample != GREEDY], session.config.evaluation)
    if session.config.learner.constraint.cost is not None:
        metrics["cost"] = fmean(own.metrics["cost"] for own in found)
    return Evaluated(answers, metrics, dict(zip(rows, (own.metrics for own in found), strict=True)))


async def _evaluate_task(
    session: Session, task: str, rows: Sequence[dict[str, Any]], policy: Path, reference: Path
) -> Evaluated:
    settings, path = session.config.evaluation, session.config.by_task()[task].metrics
    drawn = await _draw(session, task, rows, policy, settings.num_samples)
    conversations = [one.conversation for one in drawn]
    kl_nats = await _kl_nats(session, conversations, policy, reference)
    scores = await score(session, task, [one.row for one in drawn], conversations)
    answers = [_answer(task, *values) for values in zip(drawn, scores, kl_nats, strict=True)]
    metrics = _metrics(answers, settings) | _environment_metrics(conversations)
    cost = session.config.learner.constraint.cost
    if cost is not None:
        metrics["cost"] = mean_cost(scores, cost)
    if path:
        key = session.config.key_of(task, "metrics")
        metrics |= measure(path, [_columns(one) for one in drawn], [c.response for c in conversations], key=key)
    if settings.greedy:
        greedy = await _draw_greedy(session, task, rows, policy)
        scores = await score(session, task, rows, [one.conversation for one in greedy])
        answers += [_answer(task, one, score, 0.0) for one, score in zip(greedy, scores, strict=True)]
        metrics["reward_greedy"] = fmean(answer.reward for answer in answers if answer.sample == GREEDY)
    return Evaluated(answers, metrics)


async def _draw(
    session: Session, task: str, rows: Sequence[dict[str, Any]], policy: Path, num_samples: int
) -> list[Drawn]:
    """Sample `num_samples` conversations for each row."""
    seed = f"{session.config.run.seed}-evaluation"
    groups = await session.answer(rows, policy, task=task, num=num_samples, seed=seed)
    return [
        Drawn(index, rows[index], sample, conversation)
        for index, group in enumerate(groups)
        for sample, conversation in enumerate(group)
    ]


async def _draw_greedy(session: Session, task: str, rows: Sequence[dict[str, Any]], policy: Path) -> list[Drawn]:
    """Sample the greedy conversation of each row."""
    groups = await session.answer(rows, policy, task=task, num=1, seed="greedy", temperature=0.0)
    return [Drawn(index, rows[index], GREEDY, group[0]) for index, group in enumerate(groups)]


async def _kl_nats(
    session: Session, conversations: Sequence[Conversation], policy: Path, reference: Path
) -> list[float]:
    """Return the log-probability ratio of policy and reference, summed over the sampled tokens, in nats."""
    sequences = [sequence for conversation in conversations for sequence in conversation.sequences]
    policy_logprobs, reference_logprobs = [
        _sampled(await session.logprobs(sequences, folder), conversations) for folder in (policy, reference)
    ]
    return [sum(p) - sum(r) for p, r in zip(policy_logprobs, reference_logprobs, strict=True)]


def _answer(task: str, one: Drawn, score: Score, kl_nats: float) -> Answer:
    return Answer(
        row=one.index,
        sample=one.sample,
        prompt=prompt_text(one.conversation),
        question=last_question(one.conversation, one.row["prompt"]),
        response=response_text(one.conversation),
        reward=score.reward,
        kl_nats=kl_nats,
        parts=one.conversation.parts,
        task=task,
    )


def _columns(one: Drawn) -> dict[str, Any]:
    """Return the columns of the row, with the conversation's messages if it has any."""
    messages = one.conversation.messages
    return {**one.row, "conversation": messages} if messages else dict(one.row)


def _metrics(answers: Sequence[Answer], settings: EvaluationConfig) -> dict[str, float]:
    """Return means over all answers, and the confidence interval of the reward over prompts."""
    interval = reward_interval(answers)
    return {
        "reward": interval.mean,
        "reward_low": interval.low,
        "reward_high": interval.high,
        "kl_nats": fmean(answer.kl_nats for answer in answers),
        "distinct": len({answer.response for answer in answers}) / len(answers),
        **({} if settings.pass_reward is None else pass_rates(answers, settings.pass_reward)),
    }


def _environment_metrics(conversations: Sequence[Conversation]) -> dict[str, float]:
    """Return the mean number of turns and the mean of each value in the environment's `info`."""
    if not any(conversation.messages for conversation in conversations):
        return {}
    names = sorted({name for conversation in conversations for name in conversation.parts})
    means = {name: fmean(c.parts[name] for c in conversations if name in c.parts) for name in names}
    return {"num_turns": fmean(len(conversation.turns) for conversation in conversations), **means}


def prompt_text(conversation: Conversation) -> str:
    """Return the prompt, or all messages before the first response, for a person to read."""
    if not conversation.messages:
        return conversation.prompt
    before = itertools.takewhile(lambda message: message["role"] != "assistant", conversation.messages)
    return "\n".join(message.get("content") or "" for message in before)


def last_question(conversation: Conversation, prompt: Any) -> str:
    """Return the last user message before the first response; empty if the prompt has no messages."""
    first = itertools.takewhile(lambda message: message["role"] != "assistant", conversation.messages)
    messages = [*first] or [*getattr(prompt, "messages", ())]
    contents = [message["content"] for message in messages if message["role"] == "user"]
    return str(contents[-1]) if contents else ""


def response_text(conversation: Conversation) -> str:
    """Return the response, or all messages from the first response on, for a person to read."""
    if not conversation.messages:
        return conversation.response
    first = next(i for i, message in enumerate(conversation.messages) if message["role"] == "assistant")
    return "\n".join(f"{message['role']}: {message['content']}" for message in conversation.messages[first:])


def measure(
    path: str, rows: Sequence[Mapping[str, Any]], responses: Sequence[str], *, key: str = "evaluation.metrics"
) -> dict[str, float]:
    """Call the metrics function at the dotted path with prompts, responses and the columns that it takes.

    `key` is the key of the function in the run file, for error messages.
    """
    function = user_code.load(path, key)
    columns = columns_for(function, rows, key, num_texts=2)
    metrics: dict[str, float] = function([row["prompt"] for row in rows], list(responses), **columns)
    return metrics


def _sampled(logprobs: Sequence[Sequence[float]], conversations: Sequence[Conversation]) -> list[list[float]]:
    """Keep those of each conversation's sampled tokens; the values of a sequence start at its second token."""
    found, by_sequence = list[list[float]](), iter(logprobs)
    for conversation in conversations:
        values = [value for _ in conversation.sequences for value in (0.0, *next(by_sequence))]
        found.append([value for value, is_sampled in zip(values, conversation.mask, strict=True) if is_sampled])
    return found
