"""Sample pairs of responses of a run's newest policy and serve the labelling page.

Rollout actors sample the pairs once for each policy, and the run's reward model scores them once. Everything is stored
in RUN/feedback.sqlite.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from starlette.types import ASGIApp

from cluster.data.control_tokens import RenderedPrompt
from cluster.data.prompt_order import MixedPrompts, TaskPrompts
from cluster.errors import InputError, RewardError
from cluster.scoring import Score, ScoreRequest
from deploy.config.load import read_run_config
from deploy.config.schema import RunConfig
from deploy.data.prompts import rendered_rows, task_prompts
from deploy.run.artifacts import newest_policy
from deploy.run.directory import RunDirectory
from deploy.run.layout import CONFIG, FEEDBACK
from deploy.run.reward_models import published_folder
from deploy.runtime.session import Session
from deploy.runtime.signals import interruptible
from deploy.terminal.view import View
from reward_service.config.service import REWARD_MODEL, RewardServiceConfig
from reward_service.feedback.routes import feedback_router
from reward_service.feedback.schemas import MAX_TEXT_CHARACTERS, CandidatePair
from reward_service.feedback.selection import FeedbackSettings
from reward_service.feedback.store import FeedbackStore
from reward_service.http.address import check_address
from reward_service.http.app import guarded_app
from reward_service.http.metrics import HttpMetrics
from reward_service.http.server import http_server, listening_socket
from reward_service.http.tokens import token_book, with_tokens
from reward_service.serving.application import service_url
from rollout_actors.prompts import scorer_columns

UNCERTAINTY = "uncertainty"
NUM_SAMPLED = 4
"""Responses sampled for each prompt; the first two that differ become the pair."""
GRACE_S = 2


def collect_feedback(
    run: RunDirectory, *, host: str, port: int, num_pairs: int, annotators_per_pair: float, random_share: float
) -> None:
    """Serve the labelling page; prints ``listening on URL/label`` and returns after SIGINT or SIGTERM.

    Starts no engine if the newest policy already has `num_pairs` pairs. Call it on the main thread. Raises InputError
    if the run has no policy, if another process uses the run, and if the port is taken.
    """
    config = read_run_config(run.path / CONFIG)
    policy = newest_policy(config, run)
    version = policy.version()
    settings = FeedbackSettings(
        seed=config.run.seed,
        random_share=random_share,
        annotators_per_pair=annotators_per_pair,
        policy_version=version,
    )
    service = with_tokens(config.reward_service, run.path).model_copy(update={"host": host, "port": port})
    check_address(service, os.environ.get("ANTIPHON_TOKEN"))
    with interruptible():
        store = FeedbackStore(run.path / FEEDBACK)
        try:
            _add_missing_pairs(store, config, run, policy.folder, version, num_pairs)
            _add_rewards(store, run, version)
            serve_app(label_app(store, settings, service), service)
        finally:
            store.close()


def label_app(store: FeedbackStore, settings: FeedbackSettings, config: RewardServiceConfig) -> ASGIApp:
    """Return the app of the labelling page and the feedback routes, with the tokens of the reward service."""
    return guarded_app(
        "Antiphon labelling",
        [feedback_router(store, settings=settings)],
        tokens=token_book(config, os.environ.get("ANTIPHON_TOKEN") or None),
        limits=config.http,
        metrics=HttpMetrics(),
    )


def serve_app(app: ASGIApp, config: RewardServiceConfig) -> None:
    """Serve at the host and port of `config` until SIGINT or SIGTERM."""
    assert config.port is not None
    bound = listening_socket(config.host, config.port)
    print(f"listening on {service_url(config)}/label", flush=True)
    try:
        http_server(app, config.http, drain_timeout_s=GRACE_S).run(sockets=[bound])
    except KeyboardInterrupt:
        return


def _add_missing_pairs(
    store: FeedbackStore, config: RunConfig, run: RunDirectory, policy: Path, version: str, num_pairs: int
) -> None:
    """Sample pairs until there are `num_pairs`; pair i of a policy always has the same prompt."""
    known = asyncio.run(store.pair_ids(version))
    first = max((_index(pair) for pair in known), default=-1) + 1
    if first >= num_pairs:
        return
    run.lock()
    try:
        with View(f"{config.run.name}  {first} of {num_pairs} pairs to label exist") as view:
            session = Session(config, run, view)
            pairs = asyncio.run(_sample_pairs(session, policy, version, range(first, num_pairs)))
    finally:
        run.close()
    asyncio.run(store.add_pairs(pairs))


def _index(pair: str) -> int:
    return int(pair.rpartition("-")[2])


async def _single_turn_prompts(session: Session) -> list[TaskPrompts]:
    """Return the prompts of the tasks without an environment. Raises InputError if there are none."""
    tasks, prompts = session.config.by_task(), await task_prompts(session)
    single_turn = [p for p, task in zip(prompts, tasks.values(), strict=True) if task.environment.path is None]
    if not single_turn:
        raise InputError("environment", "labelling needs a task without an environment; this run has none")
    return single_turn


async def _sample_pairs(session: Session, policy: Path, version: str, indices: range) -> list[CandidatePair]:
    seed = session.config.run.seed
    session.view.stage("pairs", len(indices))
    session.connect()
    try:
        order = MixedPrompts(await _single_turn_prompts(session), random.Random(f"{seed}-{version}").getrandbits(32))
        rows = await rendered_rows(session, [dict(order.prompt(index).row) for index in indices])
        sampled = await session.sample(
            [row["prompt"] for row in rows],
            policy,
            num=NUM_SAMPLED,
            seed=f"{seed}-label-{version}-{indices.start}",
            progress=lambda num_done: session.view.step({"step": num_done}),
        )
    finally:
        await session.close()
    pairs = []
    for index, row, responses in zip(indices, rows, sampled, strict=True):
        texts = list(dict.fromkeys(response.text for response in responses))
        if len(texts) > 1 and max(map(len, (row["prompt"], *texts))) <= MAX_TEXT_CHARACTERS:
            pairs.append(_pair(f"{seed}-{version}-{index}", row, texts, version))
    if len(pairs) < len(indices):
        num_left_out = len(indices) - len(pairs)
        session.view.note(f"{num_left_out} prompts left out: their responses are equal or too long to show")
    return pairs


def _pair(id: str, row: Mapping[str, Any], texts: Sequence[str], version: str) -> CandidatePair:
    columns = {name: value for name, value in scorer_columns(row).items() if _is_json(value)}
    return CandidatePair(
        id=id,
        prompt=str(row["prompt"]),
        first=texts[0],
        second=texts[1],
        policy_version=version,
        columns=columns,
    )


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True


def _add_rewards(store: FeedbackStore, run: RunDirectory, policy_version: str) -> None:
    """Score the policy's unscored pairs with the run's reward model, if it has one."""
    folder = published_folder(run.path)
    if folder is None:
        return
    version = f"{REWARD_MODEL}@{folder.name}"
    pairs = asyncio.run(store.pairs_not_judged(policy_version, version))
    if not pairs:
        return
    from reward_service.scorers.reward_model import RewardModelScorer

    requests = [
        ScoreRequest(f"{pair.id}/{side}", RenderedPrompt(pair.prompt), text, pair.columns)
        for pair in pairs
        for side, text in (("first", pair.first), ("second", pair.second))
    ]
    outcomes = asyncio.run(RewardModelScorer(folder).score(requests))
    failed = [outcome for outcome in outcomes if not isinstance(outcome, Score)]
    if failed:
        View().note(f"{len(failed)} responses have no reward ({failed[0]})")
    scored = [
        pair.model_copy(update={"scorer_version": version, **_rewards(first, second)})
        for pair, first, second in zip(pairs, outcomes[::2], outcomes[1::2], strict=True)
    ]
    asyncio.run(store.add_pairs(scored))


def _rewards(first: Score | RewardError, second: Score | RewardError) -> dict[str, float]:
    """Return the rewards of a pair and, for an ensemble, the standard deviation of their difference."""
    outcomes = {"first": first, "second": second}
    scores = {side: outcome for side, outcome in outcomes.items() if isinstance(outcome, Score)}
    deviations = [score.parts[UNCERTAINTY] for score in scores.values() if UNCERTAINTY in score.parts]
    rewards = {f"{side}_reward": score.reward for side, score in scores.items()}
    return rewards | ({UNCERTAINTY: math.hypot(*deviations)} if len(deviations) == 2 else {})
