"""Read prompts and turn them into rows as they are sampled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from cluster.actors.remote import stream_task
from cluster.data.broken_rows import BrokenRows
from cluster.data.datasets import Reading
from cluster.data.prompt_order import TaskPrompts
from cluster.errors import AntiphonError
from deploy.data.adversarial import write_altered
from deploy.run.artifacts import data_path, policy_path
from deploy.runtime.session import Session
from rollout_actors.prompts import holds_messages, read_rows, ready_rows

if TYPE_CHECKING:
    pass


async def task_prompts(session: Session) -> list[TaskPrompts]:
    """The prompts that the tasks are trained on, and how often they come."""
    config, found = session.config, list[TaskPrompts]()
    for name, task in config.by_task().items():
        rows = await prompt_rows(session, "prompts", name, altered_share=task.adversarial_share)
        found.append(TaskPrompts(config.recorded_as(name), rows, task.weight))
    return found


async def prompt_rows(
    session: Session, name: str, task: str = "", *, altered_share: float = 0.0
) -> list[dict[str, Any]]:
    """The rows of a task's data set `name` (prompts, evaluation) as they are sampled; counts those that are too long.

    That share of them have a prompt altered as `adversarial` says; such a data set is kept in RUN/adversarial.
    One that says nothing where the prompts come from an environment alone.
    Where that takes a tokenizer it is done in a process of its own: this one is spared the import.
    """
    config, run, of_task = session.config, session.run, session.config.by_task()[task]
    path, settings, reading = data_path(config, run.path, name, task), config.rollout_actors, config.data.reading()
    if of_task.environment.path is not None and not path.exists():
        return [{"prompt": ""}]
    seed, name = f"{config.run.seed}-{name}", f"{task}.{name}" if task else name
    broken = BrokenRows(reading.broken_rows)
    rows: list[dict[str, Any]] = read_rows(path, reading, broken)
    if altered_share:
        path, reading = run.path / "adversarial" / f"{name}.parquet", Reading(broken_rows=reading.broken_rows)
        write_altered(rows, path, of_task.adversarial, seed=seed, share=altered_share)
        rows = read_rows(path)
    if not holds_messages(rows) and settings.long_prompts == "error":
        _keep_broken(session, name, broken.errors)
        return rows
    num_rows = len(rows)
    ready = stream_task(
        ready_rows,
        path,
        policy_path(config, run.path),
        max_prompt_tokens=settings.max_prompt_tokens,
        long_prompts=settings.long_prompts,
        reading=reading,
        name=f"data.{name}",
        log_path=session.log_path("prompts"),
    )
    (read,) = [part async for part in ready]
    _keep_broken(session, name, read.broken)
    rows, num_rows = read.rows, num_rows + len(broken.errors) - len(read.broken)
    num_dropped = num_rows - len(rows)
    run.update_summary({f"data.{name}.num_prompts": len(rows), f"data.{name}.num_dropped": num_dropped})
    if num_dropped:
        limit = f"rollout_actors.max_prompt_tokens ({settings.max_prompt_tokens})"
        session.view.note(f"{name}: {num_dropped:,} of {num_rows:,} prompts are longer than {limit}: left out")
    return rows


def _keep_broken(session: Session, name: str, errors: Sequence[AntiphonError]) -> None:
    """Write down which rows of a data set were left out as broken, and say how many."""
    if not errors:
        return
    path = session.run.path / "logs" / f"broken_rows_{name}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{error}\n" for error in errors))
    session.run.update_summary({f"data.{name}.num_broken": len(errors)})
    say_broken(session, name, len(errors), f"logs/{path.name}")


def say_broken(session: Session, name: str, num: float, where: str) -> None:
    session.view.note(f"{name}: {num:,.0f} broken rows left out (see {where})")
