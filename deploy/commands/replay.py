"""`antiphon replay`: a run's recorded trajectories, trained again in their order by a fresh learner group.

Every version's checksums are compared with those that were published; under other learner settings the curves are laid
beside the recorded ones instead. Writes nothing into the run but what the learners print. What is sampled again is
`replay_tokens`' affair.
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
from deploy.commands.replay_tokens import TokenReplay
from deploy.config.load import load_run_config, read_run_config
from deploy.config.schema import RunConfig
from deploy.config.toml import flat
from deploy.ring.learners import start_learners
from deploy.run.artifacts import policy_path
from deploy.run.directory import RunDirectory
from deploy.run.layout import CONFIG, RECORDS
from deploy.run.stages import checkpoint_step
from deploy.runtime.session import Session
from deploy.runtime.signals import interruptible
from deploy.terminal.view import View
from learner.ppo.group import PPOLearnerGroup
from learner.ppo.schedule import Lengths

CURVES = {
    "reward": "learner/reward_mean",
    "KL nats": "learner/kl_nats",
    "entropy nats": "learner/entropy_nats",
    "clip fraction": "learner/clip_fraction",
}
PLAIN_WIDTH = 120


@dataclass(frozen=True, slots=True)
class Plan:
    """Which steps are replayed: those after `start`, the checkpoint's version, to `last`; `first` was asked for."""

    first: int
    last: int
    start: int
    checkpoint: Path | None

    def steps(self) -> range:
        """What is trained again."""
        return range(self.start + 1, self.last + 1)


class Retrained(NamedTuple):
    """A version as it came out this time; the one that was started from has no metrics."""

    manifest: Manifest
    metrics: Mapping[str, float]


def replay(run: RunDirectory, *, steps: str | None, what_if: Sequence[str], tokens: bool) -> None:
    """Replay a run and print what came of it.

    Raises AntiphonError naming the first step whose version differs, or how many segments do; InputError where the run
    has recorded nothing or the options make no sense.
    """
    if what_if and tokens:
        raise InputError("--what-if", "other settings give other weights, with which no token is to be the same")
    config = read_run_config(run.path / CONFIG)
    history = History(run.path / RECORDS)
    plan = make_plan(run, history, steps, older=config.trajectory_queue.max_policy_lag if tokens else 0)
    changed = changed_config(run, config, what_if) if what_if else config
    with interruptible(), View(f"replay of {run.path}") as view:
        view.stage("replay", plan.last)
        session = Session(changed, run, view)
        lengths = history.lengths if changed.learner.num_steps == config.learner.num_steps else ()
        outcome = asyncio.run(_replay(session, history, plan, lengths, what_if=bool(what_if), tokens=tokens))
    console = Console(highlight=False, markup=False, width=PLAIN_WIDTH)
    for shown in outcome.shown:
        console.print(shown, soft_wrap=True)
    if outcome.tokens is not None:
        outcome.tokens.require_identical()


class Outcome(NamedTuple):
    """What a replay has to show."""

    shown: Sequence[str | Table]
    tokens: TokenReplay | None = None


async def _replay(
    session: Session, history: History, plan: Plan, lengths: Lengths, *, what_if: bool, tokens: bool
) -> Outcome:
    session.connect()
    try:
        again = Replay(partial(start_learners, session, lengths=lengths), history, plan, session.view.step)
        if what_if:
            return Outcome([await again.curves(session.run.metrics())])
        token_replay = await _token_replay(session, history, plan) if tokens else None
        same = await again.compare(token_replay)
        return Outcome([same, token_replay.report()], token_replay) if token_replay else Outcome([same])
    finally:
        await session.close()


async def _token_replay(session: Session, history: History, plan: Plan) -> TokenReplay:
    config = session.config
    actors = await session.rollout_actors(config.rollout_actors.num_actors, policy_path(config, session.run.path))
    steps = range(plan.first, plan.last + 1)
    lag, temperature = config.trajectory_queue.max_policy_lag, config.rollout_actors.temperature
    return TokenReplay(actors, history, steps=steps, max_policy_lag=lag, temperature=temperature)


def make_plan(run: RunDirectory, history: History, steps: str | None, *, older: int) -> Plan:
    """The steps of `A:B` (either may be left out), from the newest checkpoint that is old enough.

    `older` is how many versions before step A's start are needed as well.
    """
    if not history.steps:
        raise InputError(str(run.path), f"has recorded no step (in {RECORDS})")
    last_recorded = history.steps[-1]
    match = re.fullmatch(r"(\d*):(\d*)", steps or ":")
    if match is None:
        raise InputError("--steps", f"{steps!r} is not A:B, such as 10:20")
    first, last = int(match[1] or 1), int(match[2] or last_recorded)
    if not 1 <= first <= last <= last_recorded:
        raise InputError("--steps", f"{steps} is not within the recorded steps 1:{last_recorded}")
    oldest = first - 1 - older
    checkpoint = next((path for path in reversed(run.checkpoints("ppo")) if checkpoint_step(path) <= oldest), None)
    return Plan(first, last, checkpoint_step(checkpoint) if checkpoint else 0, checkpoint)


def changed_config(run: RunDirectory, config: RunConfig, lines: Sequence[str]) -> RunConfig:
    """The run's settings with other learner settings. Raises InputError naming a key that is none."""
    changed = load_run_config(run.path / CONFIG, lines, beside=False, option="--what-if")
    before, now = flat(config), flat(changed)
    others = [k for k in {**before, **now} if before.get(k) != now.get(k) and not k.startswith("learner.")]
    if others:
        raise InputError("--what-if", f"{others[0]} is no learner setting: what was recorded does not depend on it")
    return changed


class Replay:
    """The steps of `plan`, trained once more by the group that `start(checkpoint, first_step)` starts; `tell` hears of
    each."""

    def __init__(
        self,
        start: Callable[[Path | None, int], Awaitable[PPOLearnerGroup]],
        history: History,
        plan: Plan,
        tell: Callable[[Mapping[str, float]], None],
    ) -> None:
        self._start = start
        self._history = history
        self._plan = plan
        self._tell = tell

    async def versions(self) -> AsyncGenerator[Retrained, None]:
        """Every version from the one that is started from, one after the other."""
        learners = await self._start(self._plan.checkpoint, self._plan.start + 1)
        try:
            yield Retrained(await learners.publish_initial(), {})
            for step in self._plan.steps():
                groups = await asyncio.to_thread(self._history.groups, step)
                result = await learners.step(step, groups)
                self._tell({"step": step, **result.metrics})
                yield Retrained(result.manifest, result.metrics)
        finally:
            await learners.shutdown()

    async def compare(self, tokens: TokenReplay | None = None) -> str:
        """Compare every version with the recorded one, and have what it sampled sampled again; says how many are equal.

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
        """The curves of this training beside the recorded ones; `metrics` are the run's rows."""
        recorded = {row["step"]: row for row in metrics if row.get("stage") == "ppo"}
        table = Table(box=box.SIMPLE, header_style="dim", caption="as recorded -> what if")
        for name in ("step", *CURVES):
            table.add_column(name, justify="right")
        async with aclosing(self.versions()) as versions:
            async for manifest, now in versions:
                before = recorded.get(manifest.version, {})
                if now:
                    cells = (f"{_number(before.get(key))} -> {_number(now.get(key))}" for key in CURVES.values())
                    table.add_row(str(manifest.version), *cells)
        return table


def require_same(manifest: Manifest, history: History) -> bool:
    """True where the recorded version has the same bits; AntiphonError naming the step where it has others.

    False where it was trained and a kill came before its publication was recorded: there is nothing to compare.
    """
    version = manifest.version
    if version not in history.versions:
        return False
    changed = manifest.changed_tensors(history.checksums(version))
    if changed:
        what = f"version {version} differs in {len(changed)} of {len(manifest.tensors)} tensors ({changed[0]})"
        raise AntiphonError(f"step {version}", f"{what}: from here on it is another run")
    return True


def _number(value: float | None) -> str:
    return "?" if value is None else f"{value:.4f}"
