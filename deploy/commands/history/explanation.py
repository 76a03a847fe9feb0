"""Print one conversation of a run turn by turn, with value, advantage and update of every token.

Trains the step again from the nearest checkpoint, with one learner in this process, to get the values and advantages
that training used. Does not change the run. `explanation_page` writes the HTML page.
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
from deploy.commands.history.explanation_page import write_page
from deploy.commands.history.inspect import decoder
from deploy.commands.history.retraining import Plan, make_plan
from deploy.commands.history.transcript import Span, Transcript, spans_of
from deploy.config.load import read_run_config
from deploy.config.schema import RunConfig
from deploy.ring.learners import start_learners
from deploy.ring.phases import phases_of, recorded_settings
from deploy.run.directory import RunDirectory
from deploy.run.layout import CONFIG, RECORDS
from deploy.runtime.session import Session
from deploy.runtime.signals import interruptible
from deploy.terminal.text import visible
from deploy.terminal.view import View
from learner.ppo.explanation import Explanation

PLAIN_WIDTH = 120


def explain_conversation(run: RunDirectory, uid: str, *, html: Path | None) -> None:
    """Print a conversation and, if `html` is set, write it as a page.

    Raises InputError if it was not trained.
    """
    config = read_run_config(run.path / CONFIG)
    history = History(run.path / RECORDS)
    step = history.step_of(uid)
    if step is None:
        raise InputError("UID", f"no recorded step of {run.path} was trained on {uid!r}")
    if html is not None and not html.absolute().parent.is_dir():
        raise InputError("--html", f"no such folder: {html.absolute().parent}")
    plan = make_plan(run, history, f"{step}:{step}", older=0)
    with interruptible(), View(f"explanation of {uid} in {run.path}") as view:
        view.stage("explain", plan.last)
        session = Session(_with_one_learner(config), run, view)
        result = asyncio.run(_retrain(session, history, plan, uid))
    trajectory = next(t for group in history.groups(step) for t in group if t.uid == uid)
    spans = spans_of(trajectory, result.explanation, decoder(run.path.absolute()))
    transcript = Transcript(run.path.name, trajectory, spans, result.comparison)
    _print(transcript)
    if html is not None:
        write_page(transcript, html)
        print(f"written: {html}")


def _with_one_learner(config: RunConfig) -> RunConfig:
    """Return the run's settings with one learner in this process."""
    learner = config.learner.model_copy(update={"num_learners": 0, "data_parallel": "ddp"})
    return config.model_copy(update={"learner": learner})


@dataclass(frozen=True, slots=True)
class RetrainedStep:
    """The values of a trajectory in the retrained step; `comparison` is about the weights before it."""

    explanation: Explanation
    comparison: str


async def _retrain(session: Session, history: History, plan: Plan, uid: str) -> RetrainedStep:
    session.connect()
    try:
        phases = phases_of(recorded_settings(history), session.config)
        lengths = history.lengths
        learners = await start_learners(session, plan.checkpoint, plan.start + 1, lengths=lengths, phases=phases)
        manifest = await learners.publish_initial()
        for step in range(plan.start + 1, plan.last):
            manifest = (await learners.step(step, history.groups(step))).manifest
            session.view.step({"step": step})
        explanation = await learners.explain(plan.last, history.groups(plan.last), uid)
        return RetrainedStep(explanation, _compare(manifest, history))
    finally:
        await session.close()


def _compare(manifest: Manifest, history: History) -> str:
    """Describe whether the weights before the step equal the recorded ones.

    If the run had several learners, the last bits differ.
    """
    version = manifest.version
    if version not in history.versions:
        return f"from version {version}, whose checksums were not recorded"
    changed = manifest.changed_tensors(history.checksums(version))
    if changed:
        differing = f"{len(changed)} of {len(manifest.tensors)} tensors"
        return f"from version {version}, which differs from the recorded one in {differing}"
    return f"from version {version}, which has the recorded checksums"


def _print(transcript: Transcript) -> None:
    console = Console(highlight=False, markup=False, emoji=False, width=PLAIN_WIDTH)
    console.print(Text(visible(transcript.heading()), style="bold"), soft_wrap=True)
    console.print(Text(transcript.comparison, style="dim"), soft_wrap=True)
    for span in transcript.spans:
        console.print()
        console.print(Text(span.heading(), style="bold" if span.is_sampled else "dim"))
        console.print(Text(visible(span.text)), soft_wrap=True)
        if span.is_sampled:
            console.print(_table(span))
    console.print()
    for line in transcript.summary():
        console.print(Text(visible(line)), soft_wrap=True)


def _table(span: Span) -> Table:
    table = Table(box=box.SIMPLE, header_style="dim")
    for name in ("token", "value", "advantage", "logprob", "change"):
        table.add_column(name, justify="left" if name == "token" else "right")
    for cells in _rows(span):
        table.add_row(*map(Text, cells))
    return table


def _rows(span: Span) -> Iterator[Sequence[str]]:
    for token in span.tokens:
        numbers = (f"{token.value:.4f}", f"{token.advantage:+.4f}", f"{token.before:.4f}", f"{token.change:+.4f}")
        yield repr(token.text)[1:-1], *numbers
