"""Train a run's recorded trajectories again, in the recorded order, with a new learner group.

Compares the checksums of every version with the published ones; with other learner settings, prints the training curves
beside the recorded ones. Writes nothing into the run except the learners' logs. `resampling` samples tokens again.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table

from cluster.errors import AntiphonError, InputError
from cluster.journal.history import History
from cluster.weights.manifest import Manifest
from deploy.commands.history.resampling import TokenReplay
from deploy.config.load import load_run_config, read_run_config
from deploy.config.schema import RunConfig
from deploy.config.toml import flat
from deploy.ring.learners import start_learners
from deploy.ring.phases import phases_of, recorded_settings, with_changes
from deploy.run.artifacts import policy_path
from deploy.run.directory import RunDirectory
from deploy.run.layout import CONFIG, RECORDS
from deploy.run.open import changed_inputs
from deploy.run.stages import checkpoint_step
from deploy.runtime.session import Session
from deploy.runtime.signals import interruptible
from deploy.terminal.text import number
from deploy.terminal.view import View
from learner.ppo.group import PPOLearnerGroup

CURVES = {
    "reward": "learner/reward_mean",
    "KL nats": "learner/kl_nats",
    "entropy nats": "learner/entropy_nats",
    "clip fraction": "learner/clip_fraction",
}
PLAIN_WIDTH = 120
StartsLearners = Callable[[Path | None, int], Awaitable[PPOLearnerGroup]]


@dataclass(frozen=True, slots=True)
class Plan:
    """The steps to replay, from the checkpoint's version `start` to `last`; `first` was asked for."""

    first: int
    last: int
    start: int
    checkpoint: Path | None

    def steps(self) -> range:
        """Return the steps to train again."""
        return range(self.start + 1, self.last + 1)


class RetrainedVersion(NamedTuple):
    """A version of the replay; the first one, which is loaded and not trained, has no metrics."""

    manifest: Manifest
    metrics: Mapping[str, float]


def replay_run(run: RunDirectory, *, steps: str | None, what_if: Sequence[str], tokens: bool) -> None:
    """Replay a run and print the result.

    Raises AntiphonError naming the first step whose version differs, or the number of segments that differ; InputError
    if the run has recorded no step or the options contradict each other.
    """
    if what_if and tokens:
        raise InputError(
            "--what-if", "cannot be combined with --tokens: other settings give other weights and other tokens"
        )
    config = read_run_config(run.path / CONFIG)
    _require_trained_inputs(config, run)
    history = History(run.path / RECORDS)
    plan = make_plan(run, history, steps, older=config.trajectory_queue.max_policy_lag if tokens else 0)
    changed = changed_config(run, config, what_if) if what_if else config
    with interruptible(), View(f"replay of {run.path}") as view:
        view.stage("replay", plan.last)
        session = Session(changed, run, view)
        lengths = history.lengths if changed.learner.num_steps == config.learner.num_steps else ()
        settings = recorded_settings(history)
        if tokens and len({config.rollout_actors.temperature for _, config in settings}) > 1:
            raise InputError("--tokens", "rollout_actors.temperature changed during the run: replay without --tokens")
        phases = phases_of(with_changes(settings, config, changed), changed)
        start = partial(start_learners, session, lengths=lengths, phases=phases)
        outcome = asyncio.run(_replay(session, history, plan, start, what_if=bool(what_if), tokens=tokens))
    console = Console(highlight=False, markup=False, width=PLAIN_WIDTH)
    for part in outcome.report:
        console.print(part, soft_wrap=True)
    if outcome.tokens is not None:
        outcome.tokens.require_identical()


def _require_trained_inputs(config: RunConfig, run: RunDirectory) -> None:
    """Raise InputError if the model or the advantage estimator is not the one that the run was trained with."""
    read = ("model.path", "model.builder", "learner.advantages")
    changed = [each for each in changed_inputs(config, run) if each.input.key in read and "ppo" in each.input.read_by]
    if changed:
        what = f"has changed since the run read it: {', '.join(map(str, changed))}; restore it to replay the run"
        raise InputError(changed[0].input.key, what)


class Outcome(NamedTuple):
    """The result of a replay: what to print, and the resampled tokens if they were asked for."""

    report: Sequence[str | Table]
    tokens: TokenReplay | None = None


async def _replay(
    session: Session, history: History, plan: Plan, start: StartsLearners, *, what_if: bool, tokens: bool
) -> Outcome:
    session.connect()
    try:
        replay = Replay(start, history, plan, session.view.step)
        if what_if:
            return Outcome([await replay.curves(session.run.metrics())])
        token_replay = await _token_replay(session, history, plan) if tokens else None
        result = await replay.compare(token_replay)
        return Outcome([result, token_replay.report()], token_replay) if token_replay else Outcome([result])
    finally:
        await session.close()


async def _token_replay(session: Session, history: History, plan: Plan) -> TokenReplay:
    config = session.config
    actors = await session.rollout_actors(config.rollout_actors.num_actors, policy_path(config, session.run.path))
    steps = range(plan.first, plan.last + 1)
    lag, temperature = config.trajectory_queue.max_policy_lag, config.rollout_actors.temperature
    return TokenReplay(actors, history, steps=steps, max_policy_lag=lag, temperature=temperature)


def make_plan(run: RunDirectory, history: History, steps: str | None, *, older: int) -> Plan:
    """Plan the steps `A:B` (both ends are optional) from the newest checkpoint that is old enough.

    `older` is the number of versions before step A that are needed too.
    """
    if not history.steps:
        raise InputError(str(run.path), f"has recorded no step (in {RECORDS})")
    last_recorded = history.steps[-1]
    match = re.fullmatch(r"(\d*):(\d*)", steps or ":")
    if match is None:
        raise InputError("--steps", f"{steps!r} is not A:B, such as 10:20")
    first, last = int(match[1] or 1), int(match[2] or last_recorded)
    if not 1 <= first <= last <= last_recorded:
        raise InputError("--steps", f"{steps} is not within the recorded steps, 1:{last_recorded}")
    oldest = first - 1 - older
    checkpoint = next((path for path in reversed(run.checkpoints("ppo")) if checkpoint_step(path) <= oldest), None)
    return Plan(first, last, checkpoint_step(checkpoint) if checkpoint else 0, checkpoint)


def changed_config(run: RunDirectory, config: RunConfig, lines: Sequence[str]) -> RunConfig:
    """Return the run's settings with other learner settings.

    Raises InputError naming a key of another section.
    """
    changed = load_run_config(run.path / CONFIG, lines, beside=False, option="--what-if")
    before, now = flat(config), flat(changed)
    others = [k for k in {**before, **now} if before.get(k) != now.get(k) and not k.startswith("learner.")]
    if others:
        raise InputError("--what-if", f"{others[0]} is not a learner setting; replay changes only [learner]")
    return changed


class Replay:
    """Trains the steps of `plan` again with the learners that `start(checkpoint, first_step)` returns.

    Calls `on_step` with the metrics of each step.
    """

    def __init__(
        self,
        start: StartsLearners,
        history: History,
        plan: Plan,
        on_step: Callable[[Mapping[str, float]], None],
    ) -> None:
        self._start = start
        self._history = history
        self._plan = plan
        self._on_step = on_step

    async def versions(self) -> AsyncGenerator[RetrainedVersion, None]:
        """Yield every version, beginning with the loaded one."""
        learners = await self._start(self._plan.checkpoint, self._plan.start + 1)
        try:
            yield RetrainedVersion(await learners.publish_initial(), {})
            for step in self._plan.steps():
                groups = await asyncio.to_thread(self._history.groups, step)
                result = await learners.step(step, groups)
                self._on_step({"step": step, **result.metrics})
                yield RetrainedVersion(result.manifest, result.metrics)
        finally:
            await learners.shutdown()

    async def compare(self, tokens: TokenReplay | None = None) -> str:
        """Compare every version with the recorded one and sample its segments again; returns a summary line.

        Raises AntiphonError naming the first step whose version differs.
        """
        plan, num_equal = self._plan, 0
        async with aclosing(self.versions()) as versions:
            async for manifest, _ in versions:
                num_equal += require_same(manifest, self._history)
                if tokens is not None and manifest.version < plan.last:
                    await tokens.sample_again(manifest)
        num = len(plan.steps()) + 1
        return f"versions {plan.start} to {plan.last}: {num_equal} of {num} have the recorded checksums"

    async def curves(self, metrics: Sequence[Mapping[str, Any]]) -> Table:
        """Return a table of this training's curves beside the recorded ones; `metrics` are the run's rows."""
        recorded = {row["step"]: row for row in metrics if row.get("stage") == "ppo"}
        table = Table(box=box.SIMPLE, header_style="dim", caption="recorded -> what if")
        for name in ("step", *CURVES):
            table.add_column(name, justify="right")
        async with aclosing(self.versions()) as versions:
            async for manifest, now in versions:
                before = recorded.get(manifest.version, {})
                if now:
                    pairs = ((before.get(key), now.get(key)) for key in CURVES.values())
                    cells = (" -> ".join(number(value, ".4f", missing="?") for value in pair) for pair in pairs)
                    table.add_row(str(manifest.version), *cells)
        return table


def require_same(manifest: Manifest, history: History) -> bool:
    """Return True if the recorded version has the same bits.

    Raises AntiphonError naming the step if it differs.

    Returns False if the run was killed before it recorded this version: there is nothing to compare.
    """
    version = manifest.version
    if version not in history.versions:
        return False
    changed = manifest.changed_tensors(history.checksums(version))
    if changed:
        found = f"version {version} differs in {len(changed)} of {len(manifest.tensors)} tensors ({changed[0]})"
        raise AntiphonError(f"step {version}", f"{found}; later versions differ too")
    return True
