"""Read a task's prompts and turn them into the rows that are sampled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cluster.data.datasets import Reading, data_files
from cluster.data.invalid_rows import BrokenRows
from cluster.data.prompt_order import TaskPrompts
from cluster.errors import AntiphonError
from deploy.data.adversarial import write_altered
from deploy.run.artifacts import data_path, model_path, policy_path
from deploy.run.prompt_store import load, made_of, save
from deploy.runtime.session import Session
from rollout_actors.prompt_screen import Ready, quick_rows, ready_rows
from rollout_actors.prompt_screen import rendered_rows as rendered
from rollout_actors.prompts import Row, holds_messages, read_rows

SMALL_BYTES = 4 * 2**20
"""Size of a data set up to which this process reads it."""


@dataclass(frozen=True, slots=True)
class _DataSet:
    """A data set whose prompts are sampled; `broken_before` are the errors of the original if it was altered."""

    name: str
    path: Path
    reading: Reading
    broken_before: Sequence[AntiphonError] = ()


async def task_prompts(session: Session) -> list[TaskPrompts]:
    """Return the training prompts of every task with the task's weight; conversations are not rendered yet."""
    config, found = session.config, list[TaskPrompts]()
    for name, task in config.by_task().items():
        rows = await prompt_rows(session, "prompts", name, altered_share=task.adversarial_share)
        found.append(TaskPrompts(config.recorded_as(name), rows, task.weight, task.shuffle))
    return found


async def screen_prompts(session: Session, names: Sequence[str]) -> None:
    """Find prompts that are too long or broken in these data sets of every task, before anything is loaded."""
    for task, settings in session.config.by_task().items():
        for name in names:
            if data_path(session.config, session.run.path, name, task).exists():
                share = settings.adversarial_share if name == "prompts" else 0.0
                await _ready(session, _data_set(session, name, task, share), task)


async def prompt_rows(session: Session, name: str, task: str = "", *, altered_share: float = 0.0) -> Sequence[Row]:
    """Return the rows of a task's data set `name` (prompts, evaluation) whose prompts may be sampled.

    `altered_share` of them have a prompt altered by the task's `adversarial` settings. If the prompts come from an
    environment only, there is one row with an empty prompt. Prompts that are too long and rows that are broken are
    left out and reported, or raise InputError, according to the settings. Conversations are not rendered yet.
    """
    environment = session.config.by_task()[task].environment
    if environment.path is not None and not data_path(session.config, session.run.path, name, task).exists():
        return [{"prompt": ""}]
    data = _data_set(session, name, task, altered_share)
    ready = await _ready(session, data, task)
    _report_broken(session, data, ready)
    if holds_messages(ready.rows) or session.config.rollout_actors.long_prompts != "error":
        _report_long(session, data, ready)
    return ready.rows


async def rendered_rows(session: Session, rows: Sequence[Row]) -> list[Row]:
    """Return these rows with texts as prompts: conversations are formatted by the chat template.

    Runs in a separate process, so that this one does not import the tokenizer.
    """
    if all(isinstance(row["prompt"], str) for row in rows):
        return list(rows)
    limit = session.config.rollout_actors.max_prompt_tokens
    (texts,) = await session.run_task(rendered, list(rows), _tokenizer_folder(session), limit, name="prompts")
    return list(texts)


def _data_set(session: Session, name: str, task: str, altered_share: float) -> _DataSet:
    """Return a data set; if a share is altered, write it to RUN/adversarial first."""
    config = session.config
    path, reading = data_path(config, session.run.path, name, task), config.data.reading()
    data = _DataSet(f"{task}.{name}" if task else name, path, reading)
    if not altered_share:
        return data
    broken = BrokenRows(reading.broken_rows)
    rows = read_rows(path, reading, broken)
    altered = session.run.path / "adversarial" / f"{data.name}.jsonl"
    ways = config.by_task()[task].adversarial
    write_altered(rows, altered, ways, seed=f"{config.run.seed}-{name}", share=altered_share)
    return _DataSet(data.name, altered, Reading(broken_rows=reading.broken_rows), broken.errors)


async def _ready(session: Session, data: _DataSet, task: str) -> Ready:
    """Return the prompts of a data set that fit: those kept in RUN/prompts, or read now and kept.

    This process reads small data sets that need no tokenizer, a separate one all others, so that their memory is freed.
    """
    config, model = session.config, _tokenizer_folder(session)
    has_environment = config.by_task()[task].environment.path is not None
    limit = None if has_environment else config.rollout_actors.max_prompt_tokens
    settings: dict[str, Any] = {"max_prompt_tokens": limit, "long_prompts": config.rollout_actors.long_prompts}
    made = made_of(data.path, model, settings | asdict(data.reading))
    kept = session.run.path / "prompts" / data.name
    ready = load(kept, made)
    if ready is not None:
        return ready
    found = None
    if sum(file.stat().st_size for file in data_files(data.path)) <= SMALL_BYTES:
        found = quick_rows(data.path, model, **settings, reading=data.reading)
    if found is None:
        (found,) = await session.run_task(
            ready_rows, data.path, model, **settings, reading=data.reading, name=f"data.{data.name}", log_name="prompts"
        )
    save(kept, made, found)
    return load(kept, made) or found


def _tokenizer_folder(session: Session) -> Path:
    """Return the folder of the run's model, or of its policy if the model is gone: their tokenizers are the same."""
    model = model_path(session.config, session.run.path)
    return model if model.is_dir() else policy_path(session.config, session.run.path)


def _report_broken(session: Session, data: _DataSet, ready: Ready) -> None:
    """List the rows that were left out as broken in a file, and print how many they are."""
    errors = [*data.broken_before, *ready.broken]
    if not errors:
        return
    path = session.run.path / "logs" / f"broken_rows_{data.name}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{error}\n" for error in errors))
    session.run.update_summary({f"data.{data.name}.num_broken": len(errors)})
    note_broken(session, data.name, len(errors), f"logs/{path.name}")


def _report_long(session: Session, data: _DataSet, ready: Ready) -> None:
    num_dropped = ready.num_readable - len(ready.rows)
    counts = {"num_prompts": len(ready.rows), "num_dropped": num_dropped}
    session.run.update_summary({f"data.{data.name}.{key}": count for key, count in counts.items()})
    if num_dropped:
        limit = f"rollout_actors.max_prompt_tokens ({session.config.rollout_actors.max_prompt_tokens})"
        what = f"{num_dropped:,} of {ready.num_readable:,} prompts are longer than {limit}: left out"
        session.view.note(f"{data.name}: {what}")


def note_broken(session: Session, name: str, num: float, list_path: str) -> None:
    """Print a note on the number of broken rows and the file that lists them."""
    session.view.note(f"{name}: {num:,.0f} broken rows left out (see {list_path})")
