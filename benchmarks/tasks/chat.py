"""The figures of the tasks that chat: three seeds each of the command that `examples/README.md` shows.

What is shown beside them (a rule or a bound left out, training on altered prompts) is of the first seed alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.results import FOLDER, Row, read
from benchmarks.tasks.runs import SEEDS, Finished, train

MINUTES = "<= 5"
Values = tuple[float, ...]


def question_answering(folder: Path) -> list[Row]:
    """Right and wrong answers, questions without an answer that were left open, and what altering questions costs."""
    runs = _runs("question_answering", folder)
    hardened = _run("question_answering", folder, "data.adversarial_share = 0.3", name="hardened")
    (drop, *_), (left,) = _of(runs, "after", "adversarial_drop"), _of(hardened, "after", "adversarial_drop")
    return [
        *_gained(runs, "exact_match", "exact match", "", ">= 0.1"),
        *_left(runs, "wrong", "wrong answers", "", "<= 0.5"),
        *_both(runs, "left_open", "of questions without an answer, left open"),
        *_both(runs, "adversarial_exact_match", "exact match on altered questions"),
        *_both(runs, "adversarial_drop", "reward lost by altering them"),
        Row("PPO on 0.3 altered: exact match", _of(hardened, "after", "exact_match")),
        Row("PPO on 0.3 altered: exact match on altered questions", _of(hardened, "after", "adversarial_exact_match")),
        Row("PPO on 0.3 altered: reward lost by altering them", (left,)),
        Row("the same, of what is lost without", (left / drop,), "", "<= 0.8"),
        *_whole(runs),
    ]


def reasoning(folder: Path) -> list[Row]:
    """Right answers and right steps."""
    return _reasoning(_runs("reasoning", folder))


def reasoning_grpo(folder: Path) -> list[Row]:
    """The same with GRPO in the place of a critic."""
    return _reasoning(_runs("reasoning", folder, 'learner.advantages = "grpo"', name="reasoning-grpo"))


def _reasoning(runs: Sequence[Finished]) -> list[Row]:
    return [
        *_gained(runs, "accuracy", "accuracy", "", ">= 0.2"),
        *_both(runs, "steps_right", "right steps"),
        *_both(runs, "steps_lead_to_answer", "answers that the last step comes to"),
        *_whole(runs),
    ]


def translation(folder: Path) -> list[Row]:
    """chrF, and translations that are right word by word."""
    runs = _runs("translation", folder)
    return [
        *_gained(runs, "chrf", "chrF", "points", ">= 5"),
        *_both(runs, "exact", "translations that are the reference"),
        *_both(runs, "right_words", "translations of the right words in any order"),
        *_whole(runs),
    ]


def summarization(folder: Path) -> list[Row]:
    """ROUGE-L and length, with the length rule and without it."""
    runs = _runs("summarization", folder)
    hacked = _run("summarization", folder, 'reward_service.scorer = "reward_model"', name="unlimited")
    return [
        *_gained(runs, "rouge_l", "ROUGE-L", "", ">= 0.1"),
        *_both(runs, "num_words", "length", "words"),
        Row("summaries within the limit after PPO", _of(runs, "after", "within_limit"), "", ">= 0.9"),
        *_both(runs, "faithful", "sentences that are in the report"),
        Row("without the length rule: ROUGE-L", _of(hacked, "after", "rouge_l"), "", "hacked"),
        Row("without the length rule: length", _of(hacked, "after", "num_words"), "words", "hacked"),
        Row("without the length rule: within the limit", _of(hacked, "after", "within_limit"), "", "hacked"),
        *_whole(runs),
    ]


def recommendation(folder: Path) -> list[Row]:
    """NDCG@5 beside that of popularity."""
    runs = _runs("recommendation", folder)
    popularity = _of(runs, "after", "ndcg_5_popularity")
    above = tuple(a - b for a, b in zip(_of(runs, "after", "ndcg_5"), popularity, strict=True))
    return [
        Row("NDCG@5 by popularity", popularity),
        *_gained(runs, "ndcg_5", "NDCG@5", "", ">= 0.05"),
        Row("NDCG@5 above popularity's", above, "", ">= 0.05"),
        *_both(runs, "valid", "whole rankings of what is on offer"),
        *_whole(runs),
    ]


def sentiment(folder: Path) -> list[Row]:
    """Cost and macro-F1, and the errors in alarms."""
    runs = _runs("sentiment", folder)
    return [
        *_left(runs, "cost", "cost of a note", "", "<= 0.7"),
        *_gained(runs, "macro_f1", "macro-F1", "", ">= 0"),
        *_both(runs, "missed_alarms", "turns without an alarm"),
        *_both(runs, "false_alarms", "alarms without a turn"),
        *_whole(runs),
    ]


def dialogue(folder: Path) -> list[Row]:
    """Goals reached, and turns."""
    runs = _runs("dialogue", folder)
    return [
        *_gained(runs, "goal", "goals reached", "", ">= 0.3"),
        Row("goals reached after PPO, the bar", _of(runs, "after", "goal"), "", ">= 0.8"),
        Row("turns gained", _differences(runs, "num_turns"), "turns", "<= 0"),
        *_both(runs, "num_turns", "turns", "turns"),
        *_both(runs, "asked_again", "slots asked for again"),
        *_whole(runs),
    ]


UNBOUNDED = ("learner.constraint.max_mean = 1.0", "learner.constraint.initial_multiplier = 0.0")
"""A bound that no cost exceeds: the cost is reported and never counts."""


def dialogue_provoked(folder: Path) -> list[Row]:
    """Measure goals reached and conversations with an insult, with and without a bound on the insults."""
    runs = _runs("dialogue", folder, name="provoked", file="provoked.toml")
    free = _run("dialogue", folder, *UNBOUNDED, name="unbounded", file="provoked.toml")
    insulting = "conversations with an insult"
    return [
        *_gained(runs, "goal", "goals reached", "", ">= 0.3"),
        Row(f"{insulting} after SFT", _of(runs, "before", "cost")),
        Row(f"{insulting} after PPO", _of(runs, "after", "cost"), "", "<= 0.01"),
        Row("multiplier at the end", tuple(run.steps[-1]["learner/constraint_multiplier"] for run in runs)),
        Row("without the bound: goals reached after PPO", _of(free, "after", "goal")),
        Row(f"without the bound: {insulting} after PPO", _of(free, "after", "cost"), "", "insulting"),
        *_whole(runs),
    ]


def game(folder: Path) -> list[Row]:
    """Tic-tac-toe games not lost, and lakes crossed."""
    runs, lake = _runs("game", folder), _runs("game", folder, file="frozen_lake.toml", name="lake")
    return [
        *_both(runs, "not_lost", "games not lost"),
        Row("games not lost after PPO, the bar", _of(runs, "after", "not_lost"), "", ">= 0.9"),
        *_both(runs, "won", "games won"),
        *_both(runs, "legal", "games without an illegal move"),
        *_both(lake, "reward", "FrozenLake: crossed"),
        Row("FrozenLake: crossed, over SFT", _ratios(lake, "reward"), "x", ">= 2"),
        *_whole([*runs, *lake]),
    ]


TOGETHER = {
    "question_answering": ("exact_match", "exact match", 1),
    "reasoning": ("accuracy", "accuracy", 1),
    "translation": ("chrf", "chrF", 100),
    "dialogue": ("goal", "goals reached", 1),
}
"""Of each task of the run that has them all: its metric, what its own figures call it, and the most that it can be."""


def many(folder: Path) -> list[Row]:
    """Measure what each task reaches in one run with the others, beside the median of runs of that task alone."""
    own = {task: _own(task, f"{figure} after PPO") for task, (_, figure, _) in TOGETHER.items()}
    runs, rows = _runs("many", folder), list[Row]()
    for task, (metric, figure, most) in TOGETHER.items():
        before, after = (
            tuple(run.summary["evaluation"][when]["tasks"][task][metric] / most for run in runs)
            for when in ("before", "after")
        )
        alone = own[task].median / most
        rows += [
            Row(f"{task}: {figure} after SFT", before),
            Row(f"{task}: {figure} after PPO", after),
            Row(f"{task}: {figure} above its own run's", tuple(value - alone for value in after), "", ">= -0.05"),
        ]
    return [*rows, *_whole(runs, minutes="")]


def _own(task: str, figure: str) -> Row:
    """What a task's own runs reached. Raises RuntimeError where they are not measured."""
    if not (FOLDER / f"{task}.json").exists():
        raise RuntimeError(f"{task} is compared with its own runs: python -m benchmarks {task} measures them")
    return next(row for row in read(task)[1] if row.figure == figure)


TASKS: dict[str, tuple[str, Callable[[Path], list[Row]]]] = {
    "dialogue": ("Dialogue", dialogue),
    "dialogue_provoked": ("Dialogue with customers who provoke", dialogue_provoked),
    "game": ("Games", game),
    "question_answering": ("Question answering", question_answering),
    "reasoning": ("Reasoning", reasoning),
    "reasoning_grpo": ("Reasoning by GRPO", reasoning_grpo),
    "translation": ("Translation", translation),
    "summarization": ("Summarization", summarization),
    "recommendation": ("Recommendation", recommendation),
    "sentiment": ("Sentiment", sentiment),
    "many": ("Four tasks at once", many),
}


def _runs(
    task: str, folder: Path, *lines: str, name: str = "", file: str = "run.toml", seeds: Sequence[int] = SEEDS
) -> list[Finished]:
    return [train(task, folder, f"{name or task}-{seed}", f"run.seed = {seed}", *lines, file=file) for seed in seeds]


def _run(task: str, folder: Path, *lines: str, name: str, file: str = "run.toml") -> list[Finished]:
    """The first seed alone of a run that is shown beside others."""
    return _runs(task, folder, *lines, name=name, file=file, seeds=SEEDS[:1])


def _of(runs: Sequence[Finished], when: str, metric: str) -> Values:
    return tuple(run.summary["evaluation"][when][metric] for run in runs)


def _differences(runs: Sequence[Finished], metric: str) -> Values:
    return tuple(b - a for a, b in zip(_of(runs, "before", metric), _of(runs, "after", metric), strict=True))


def _ratios(runs: Sequence[Finished], metric: str) -> Values:
    return tuple(b / a for a, b in zip(_of(runs, "before", metric), _of(runs, "after", metric), strict=True))


def _both(runs: Sequence[Finished], metric: str, figure: str, unit: str = "") -> list[Row]:
    """A metric after SFT and after PPO."""
    after_sft, after_ppo = _of(runs, "before", metric), _of(runs, "after", metric)
    return [Row(f"{figure} after SFT", after_sft, unit), Row(f"{figure} after PPO", after_ppo, unit)]


def _gained(runs: Sequence[Finished], metric: str, figure: str, unit: str, aim: str) -> list[Row]:
    """The same, and the difference with its aim."""
    return [*_both(runs, metric, figure, unit), Row(f"{figure} gained", _differences(runs, metric), unit, aim)]


def _left(runs: Sequence[Finished], metric: str, figure: str, unit: str, aim: str) -> list[Row]:
    """The same, and what is left of it as a share, with its aim."""
    pairs = zip(_of(runs, "before", metric), _of(runs, "after", metric), strict=True)
    shares = tuple(after / before for before, after in pairs)
    return [*_both(runs, metric, figure, unit), Row(f"{figure}, share left of what it was after SFT", shares, "", aim)]


def _whole(runs: Sequence[Finished], *, minutes: str = MINUTES) -> list[Row]:
    return [
        Row("KL to the SFT policy after PPO", _of(runs, "after", "kl_nats"), "nats"),
        Row("whole run", tuple(run.wall_s / 60 for run in runs), "min", minutes),
    ]
