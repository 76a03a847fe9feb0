"""Write questions of reasoning-gym: demonstrations, training questions in the order of the lessons, held-out ones."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import cycle, islice
from pathlib import Path

from cluster.errors import InputError
from examples.conversations import Row, write_data
from examples.reasoning_gym.tasks import SIZE, Task, Tasks, tasks_of

MAX_TRIES = 50
"""Draws for each question that is wanted, since the questions of small tasks come again."""


def build_data(
    directory: Path,
    *,
    seed: int,
    tasks: Tasks = (),
    lessons: Sequence[Tasks] = (),
    num_demonstrations: int = 4000,
    num_training: int = 4000,
    num_held_out: int = 512,
    slip_share: float = 0.3,
) -> None:
    """Write `sft`, `prompts` and `evaluation` `.parquet`; no question is in two of them.

    `tasks` are asked in turn. `lessons` are several such lists: the training questions are those of the first lesson,
    then those of the second and so on, in equal numbers; demonstrations and held-out questions are of all of them. Set
    `data.shuffle = false` to train in this order. `slip_share` of the demonstrations have the answer to another
    question, so that PPO has something to improve. Raises InputError if neither or both are given.
    """
    if bool(tasks) == bool(lessons):
        raise InputError("data.settings", "give tasks or lessons")
    by_lesson = [tasks_of(lesson) for lesson in lessons or [tasks]]
    every = list(dict.fromkeys(task for lesson in by_lesson for task in lesson))
    seen = set[str]()
    held_out = _rows(every, f"{seed}-held-out", num_held_out, seen)
    demonstrated = _rows(every, f"{seed}-demonstrations", num_demonstrations, seen)
    share = -(-num_training // len(by_lesson))
    training = [
        row for place, lesson in enumerate(by_lesson) for row in _rows(lesson, f"{seed}-lesson-{place}", share, seen)
    ]
    write_data(
        directory,
        demonstrations=_answered(demonstrated, slip_share, random.Random(f"{seed}-slips")),
        training=training[:num_training],
        held_out=held_out,
    )


def _answered(rows: Sequence[Row], slip_share: float, choice: random.Random) -> list[tuple[str, str]]:
    """Return questions with their answers, a share of them with the answer to another question of the same task."""
    by_task: dict[str, list[str]] = {}
    for row in rows:
        by_task.setdefault(row["task"], []).append(row["references"])
    return [
        (row["prompt"], choice.choice(by_task[row["task"]]) if choice.random() < slip_share else row["references"])
        for row in rows
    ]


def _rows(tasks: Sequence[Task], seed: str, num: int, seen: set[str]) -> list[Row]:
    """Return `num` questions of the tasks in turn, none of them in `seen`, and add them to it."""
    number = random.Random(seed).getrandbits(31)
    of_task = {task: _new_questions(task, number, num, seen) for task in tasks}
    rows = []
    for task in islice(cycle(tasks), num):
        row = next(of_task[task], None)
        if row is None:
            what = f"{task.name} has too few different questions for {num} more: ask for fewer, or make it harder"
            raise InputError("data.settings", what)
        rows.append(row)
    return rows


def _new_questions(task: Task, seed: int, num: int, seen: set[str]) -> Iterator[Row]:
    questions = task.questions(seed)
    for number in range(min(num * MAX_TRIES, SIZE)):
        item = questions[number]
        if item["question"] not in seen:
            seen.add(item["question"])
            where = {"task": task.name, "settings": task.settings, "seed": seed, "number": number}
            yield {"prompt": item["question"], "references": str(item["answer"]), **where}
