"""Read a task's prompts and turn them into the rows that are sampled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cluster.data.datasets import Reading
from cluster.data.invalid_rows import BrokenRows
from cluster.data.prompt_order import TaskPrompts
from cluster.errors import AntiphonError
from deploy.data.adversarial import write_altered
from deploy.run.artifacts import data_path, policy_path
from deploy.runtime.session import Session
from rollout_actors.prompts import holds_messages, read_rows, ready_rows


@dataclass(frozen=True, slots=True)
class _DataSet:
    """The rows of a data set; `broken` are the errors of rows of `path` that were left out.

    If the rows were altered, `broken_before` are the errors of the original data set.
    """

    name: str
    path: Path
    reading: Reading
    rows: list[dict[str, Any]]
    broken: Sequence[AntiphonError]
    broken_before: Sequence[AntiphonError] = ()


async def task_prompts(session: Session) -> list[TaskPrompts]:
    """Return the training prompts of every task with the task's weight."""
    config, found = session.config, list[TaskPrompts]()
    for name, task in config.by_task().items():
        rows = await prompt_rows(session, "prompts", name, altered_share=task.adversarial_share)
        found.append(TaskPrompts(config.recorded_as(name), rows, task.weight))
    return found


async def prompt_rows(
    session: Session, name: str, task: str = "", *, altered_share: float = 0.0
) -> list[dict[str, Any]]:
    """Return the rows of a task's data set `name` (prompts, evaluation) as they are sampled.

    `altered_share` of them have a prompt altered by the task's `adversarial` settings. If the prompts come from an
    environment only, there is one row with an empty prompt. Prompts that are too long and rows that are broken are
    left out and reported, or raise InputError, according to the settings.
    """
    environment = session.config.by_task()[task].environment
    if environment.path is not None and not data_path(session.config, session.run.path, name, task).exists():
        return [{"prompt": ""}]
    data = _read(session, name, task)
    if altered_share:
        data = _altered(session, data, name, task, altered_share)
    num_readable = None
    is_rendered = session.config.data.as_messages or holds_messages(data.rows)
    if is_rendered or session.config.rollout_actors.long_prompts != "error":
        data, num_readable = await _fit_to_length(session, data)
    _report_broken(session, data)
    if num_readable is not None:
        _report_long(session, data, num_readable)
    return data.rows


def _read(session: Session, name: str, task: str) -> _DataSet:
    path, reading = data_path(session.config, session.run.path, name, task), session.config.data.reading()
    broken = BrokenRows(reading.broken_rows)
    rows = read_rows(path, reading, broken)
    return _DataSet(f"{task}.{name}" if task else name, path, reading, rows, broken.errors)


def _altered(session: Session, data: _DataSet, name: str, task: str, share: float) -> _DataSet:
    """Write the data set with that share of its prompts altered to RUN/adversarial, and read it."""
    config = session.config
    path = session.run.path / "adversarial" / f"{data.name}.jsonl"
    write_altered(data.rows, path, config.by_task()[task].adversarial, seed=f"{config.run.seed}-{name}", share=share)
    reading = Reading(broken_rows=data.reading.broken_rows)
    return _DataSet(data.name, path, reading, read_rows(path), broken=(), broken_before=data.broken)


async def _fit_to_length(session: Session, data: _DataSet) -> tuple[_DataSet, int]:
    """Render conversations and leave out prompts that are too long; also returns the number of readable rows.

    Runs in a separate process, so that this one does not import the tokenizer.
    """
    settings = session.config.rollout_actors
    (read,) = await session.run_task(
        ready_rows,
        data.path,
        policy_path(session.config, session.run.path),
        max_prompt_tokens=settings.max_prompt_tokens,
        long_prompts=settings.long_prompts,
        reading=data.reading,
        name=f"data.{data.name}",
        log_name="prompts",
    )
    num_readable = len(data.rows) + len(data.broken) - len(read.broken)
    return replace(data, rows=read.rows, broken=read.broken), num_readable


def _report_broken(session: Session, data: _DataSet) -> None:
    """List the rows that were left out as broken in a file, and print how many they are."""
    errors = [*data.broken_before, *data.broken]
    if not errors:
        return
    path = session.run.path / "logs" / f"broken_rows_{data.name}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{error}\n" for error in errors))
    session.run.update_summary({f"data.{data.name}.num_broken": len(errors)})
    note_broken(session, data.name, len(errors), f"logs/{path.name}")


def _report_long(session: Session, data: _DataSet, num_readable: int) -> None:
    num_dropped = num_readable - len(data.rows)
    counts = {"num_prompts": len(data.rows), "num_dropped": num_dropped}
    session.run.update_summary({f"data.{data.name}.{key}": count for key, count in counts.items()})
    if num_dropped:
        limit = f"rollout_actors.max_prompt_tokens ({session.config.rollout_actors.max_prompt_tokens})"
        session.view.note(f"{data.name}: {num_dropped:,} of {num_readable:,} prompts are longer than {limit}: left out")


def note_broken(session: Session, name: str, num: float, list_path: str) -> None:
    """Print a note on the number of broken rows and the file that lists them."""
    session.view.note(f"{name}: {num:,.0f} broken rows left out (see {list_path})")
