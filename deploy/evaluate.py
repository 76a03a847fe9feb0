"""Held-out evaluation: during PPO for the best checkpoint, at the end for the table before and after.

All generation goes through a rollout actor's engine; the KL to the reference is the engine's own log-probabilities
of the responses against those of the reference weights in the same engine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from cluster.scoring import ScoreRequest
from cluster.trajectory import Segment, Trajectory, Turn
from deploy import dotted
from deploy.columns import columns_for
from deploy.reward_watch import pauses_said
from deploy.session import Session
from deploy.stages import data_path, policy_path, prompt_rows
from rollout_actors.prompts import scorer_columns
from rollout_actors.rollout_actor import Response

if TYPE_CHECKING:
    from deploy.healing import HealedLearners

NUM_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Evaluated:
    """Responses of one policy to the held-out prompts, with what was measured on them."""

    responses: list[str]
    metrics: dict[str, float]


async def held_out_rows(session: Session, num: int) -> list[dict[str, Any]]:
    """The first `num` rows of the evaluation data (of the training prompts, where a run brings no others)."""
    config, run = session.config, session.run
    path = data_path(config, run.path, "evaluation")
    rows = await prompt_rows(session, "evaluation" if path.exists() else "prompts")
    return [rows[i % len(rows)] for i in range(num)]


class HeldOut:
    """Evaluation during PPO: mean reward and KL of the newest version on a few held-out prompts."""

    def __init__(self, session: Session, learners: HealedLearners) -> None:
        self._session = session
        self._learners = learners
        self._rows: list[dict[str, Any]] = []

    async def evaluate(self, step: int) -> bool:
        """Measure version `step`; whether its reward - kl_coefficient x KL is the highest so far."""
        session = self._session
        settings = session.config.evaluation
        rows = self._rows = self._rows or await held_out_rows(session, settings.num_prompts_during)
        sampled = await session.pool.ask(
            "sample",
            [row["prompt"] for row in rows],
            num=1,
            seed=f"{session.config.run.seed}-held-out",
            temperature=session.config.rollout_actors.temperature,
            min_policy_version=step,
        )
        responses = [group[0] for group in sampled]
        rewards = await score(session, rows, [response.text for response in responses])
        records = [
            _record(i, step, response, reward)
            for i, (response, reward) in enumerate(zip(responses, rewards, strict=True))
        ]
        kl_nats = fmean(await self._learners.reference_kl(records))
        reward_mean = fmean(rewards)
        objective = reward_mean - session.config.learner.kl_coefficient * kl_nats
        metrics = {"step": step, "reward_mean": reward_mean, "kl_nats": kl_nats, "objective": objective}
        session.record("held_out", metrics)
        return self._is_best(metrics)

    def _is_best(self, metrics: dict[str, float]) -> bool:
        best = self._session.run.summary().get("held_out")
        if best is not None and metrics["objective"] <= best["objective"]:
            return False
        self._session.run.update_summary({f"held_out.{name}": value for name, value in metrics.items()})
        return True


def _record(index: int, version: int, response: Response, reward: float) -> Trajectory:
    """A held-out response as the learners read it; it is never trained on."""
    num_prompt, num_sampled = len(response.prompt_token_ids), len(response.token_ids)
    return Trajectory(
        uid=f"held-out-{index}",
        group=0,
        task="held-out",
        token_ids=[*response.prompt_token_ids, *response.token_ids],
        mask=[False] * num_prompt + [True] * num_sampled,
        behavior_logprobs=[0.0] * num_prompt + response.logprobs,
        segments=[Segment(version, num_prompt, num_sampled, 0, "held-out")],
        turns=[Turn(num_prompt, num_sampled)],
        admission_index=0,
        finish_reason="stop",
        reward=reward,
    )


async def score(session: Session, rows: Sequence[dict[str, Any]], responses: Sequence[str]) -> list[float]:
    """The rewards that the run's own reward service gives these responses."""
    requests = [
        ScoreRequest(f"held-out-{i}", row["prompt"], response, scorer_columns(row))
        for i, (row, response) in enumerate(zip(rows, responses, strict=True))
    ]
    scores = await (await session.rewards()).score(requests)
    return [score.reward for score in scores]


def mean_kl_nats(policy: Sequence[Sequence[float]], reference: Sequence[Sequence[float]]) -> float:
    """k1 (Schulman 2020, "Approximating KL divergence"): summed per response, mean over responses."""
    return fmean(sum(p) - sum(r) for p, r in zip(policy, reference, strict=True))


async def evaluate(session: Session) -> None:
    """The policy before and after PPO on the held-out prompts, into `summary.json` and onto the screen."""
    async with pauses_said(session.missing_rewards, session.view.note):
        await _evaluate(session)


async def _evaluate(session: Session) -> None:
    config, run = session.config, session.run
    rows = await held_out_rows(session, config.evaluation.num_prompts)
    session.view.stage("evaluation", 2)
    reference = policy_path(config, run.path)
    policies = {"before": reference, "after": run.path / "policy"}
    evaluated = {}
    for name, path in policies.items():
        if path.exists():
            evaluated[name] = await _evaluate_policy(session, rows, path, reference)
            run.update_summary({f"evaluation.{name}.{key}": value for key, value in evaluated[name].metrics.items()})
    if len(evaluated) == len(policies):
        before, after = evaluated["before"], evaluated["after"]
        session.view.table_before_after(before.metrics, after.metrics)
        shown = slice(0, NUM_SHOWN)
        session.view.responses([row["prompt"] for row in rows[shown]], before.responses[shown], after.responses[shown])


async def _evaluate_policy(
    session: Session, rows: Sequence[dict[str, Any]], policy: Path, reference: Path
) -> Evaluated:
    config = session.config
    prompts = [row["prompt"] for row in rows]
    sampled = await session.sample(prompts, policy, num=1, seed=f"{config.run.seed}-evaluation")
    responses = [group[0] for group in sampled]
    texts = [response.text for response in responses]
    sequences = [response.prompt_token_ids + response.token_ids for response in responses]
    logprobs = [await session.logprobs(sequences, path) for path in (policy, reference)]
    policy_logprobs, reference_logprobs = (_of_responses(values, responses) for values in logprobs)
    metrics = {
        "reward": fmean(await score(session, rows, texts)),
        "kl_nats": mean_kl_nats(policy_logprobs, reference_logprobs),
        "distinct": len(set(texts)) / len(texts),
    }
    if config.evaluation.metrics:
        metrics |= measure(config.evaluation.metrics, rows, texts)
    return Evaluated(texts, metrics)


def measure(path: str, rows: Sequence[Mapping[str, Any]], responses: Sequence[str]) -> dict[str, float]:
    """What the metrics function at that dotted path says of the responses; it gets the rows' columns that it takes."""
    function = dotted.load(path, "evaluation.metrics")
    columns = columns_for(function, rows, "evaluation.metrics", num_texts=2)
    measured: dict[str, float] = function([row["prompt"] for row in rows], list(responses), **columns)
    return measured


def _of_responses(logprobs: Sequence[Sequence[float]], responses: Sequence[Response]) -> list[Sequence[float]]:
    """The part of each sequence's log-probabilities that belongs to its response."""
    return [values[-len(response.token_ids) :] for values, response in zip(logprobs, responses, strict=True)]
