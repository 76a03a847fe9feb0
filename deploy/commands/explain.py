"""`antiphon explain`: one conversation of a run turn by turn, with what its step made of every token.

The step is trained again from the nearest checkpoint, by a learner in this process, so that values and advantages are
those that training used. Reads the run and writes nothing into it. Knows how a conversation is told in the terminal;
as a page it is told by `explain_page`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cluster.errors import InputError
from cluster.journal.history import History
from cluster.weights.manifest import Manifest
from deploy.commands.explain_page import write_page
from deploy.commands.explain_story import Part, Story, parts_of
from deploy.commands.inspect import decoder
from deploy.commands.replay import Plan, make_plan
from deploy.config.load import read_run_config
from deploy.config.schema import RunConfig
from deploy.ring.learners import start_learners
from deploy.run.directory import RunDirectory
from deploy.run.layout import CONFIG, RECORDS
from deploy.runtime.session import Session
from deploy.runtime.signals import interruptible
from deploy.terminal.text import visible
from deploy.terminal.view import View
from learner.ppo.explanation import Explanation

PLAIN_WIDTH = 120


def explain(run: RunDirectory, uid: str, *, html: Path | None) -> None:
    """Print a conversation and, where `html` is set, write it as a page. Raises InputError where it was not trained."""
    config = read_run_config(run.path / CONFIG)
    history = History(run.path / RECORDS)
    step = history.step_of(uid)
    if step is None:
        raise InputError("UID", f"no step that {run.path} has recorded was trained on {uid!r}")
    if html is not None and not html.absolute().parent.is_dir():
        raise InputError("--html", f"no such folder: {html.absolute().parent}")
    plan = make_plan(run, history, f"{step}:{step}", older=0)
    with interruptible(), View(f"explanation of {uid} in {run.path}") as view:
        view.stage("explain", plan.last)
        session = Session(_alone(config), run, view)
        retrained = asyncio.run(_retrained(session, history, plan, uid))
    trajectory = next(t for group in history.groups(step) for t in group if t.uid == uid)
    parts = parts_of(trajectory, retrained.explanation, decoder(run.path.absolute()))
    story = Story(run.path.name, trajectory, parts, retrained.same)
    _print(story)
    if html is not None:
        write_page(story, html)
        print(f"written: {html}")


def _alone(config: RunConfig) -> RunConfig:
    """The settings of the run with one learner, in this process."""
    learner = config.learner.model_copy(update={"num_learners": 0, "data_parallel": "ddp"})
    return config.model_copy(update={"learner": learner})


@dataclass(frozen=True, slots=True)
class Retrained:
    """What the step made of the trajectory, and what is to be said of the weights it was trained from."""

    explanation: Explanation
    same: str


async def _retrained(session: Session, history: History, plan: Plan, uid: str) -> Retrained:
    session.connect()
    try:
        learners = await start_learners(session, plan.checkpoint, plan.start + 1, lengths=history.lengths)
        manifest = await learners.publish_initial()
        for step in range(plan.start + 1, plan.last):
            manifest = (await learners.step(step, history.groups(step))).manifest
            session.view.step({"step": step})
        return Retrained(
            await learners.explain(plan.last, history.groups(plan.last), uid), _compared(manifest, history)
        )
    finally:
        await session.close()


def _compared(manifest: Manifest, history: History) -> str:
    """What is to be said of the weights before the step; other learners than one give other last bits."""
    version = manifest.version
    if version not in history.versions:
        return f"from version {version}, which was not recorded: there is nothing to compare it with"
    changed = manifest.changed_tensors(history.checksums(version))
    if changed:
        return f"from version {version}, {len(changed)} of whose {len(manifest.tensors)} tensors differ from the record"
    return f"from version {version}, which has the recorded checksums"


def _print(story: Story) -> None:
    console = Console(highlight=False, markup=False, emoji=False, width=PLAIN_WIDTH)
    console.print(Text(visible(story.heading()), style="bold"), soft_wrap=True)
    console.print(Text(story.same, style="dim"), soft_wrap=True)
    for part in story.parts:
        console.print()
        console.print(Text(part.heading(), style="bold" if part.is_sampled else "dim"))
        console.print(Text(visible(part.text)), soft_wrap=True)
        if part.is_sampled:
            console.print(_table(part))
    console.print()
    for line in story.ends():
        console.print(Text(visible(line)), soft_wrap=True)


def _table(part: Part) -> Table:
    table = Table(box=box.SIMPLE, header_style="dim")
    for name in ("token", "value", "advantage", "logprob", "change"):
        table.add_column(name, justify="left" if name == "token" else "right")
    for cells in _rows(part):
        table.add_row(*map(Text, cells))
    return table


def _rows(part: Part) -> Iterator[Sequence[str]]:
    for token in part.tokens:
        numbers = (f"{token.value:.4f}", f"{token.advantage:+.4f}", f"{token.before:.4f}", f"{token.change:+.4f}")
        yield repr(token.text)[1:-1], *numbers
