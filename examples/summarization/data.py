"""Make the data of summarization: reports of seven sentences, three of them with figures, and imperfect summaries.

A good summary has the sentences with figures, in the report's order, and no others. How annotators judge a summary is
defined in `annotator`.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable
from pathlib import Path

from examples.conversations import Row, distinct, write_data

FIGURES = ("sales", "profits", "costs", "orders", "exports", "debts", "prices", "wages")
MOVED = ("rose", "fell", "doubled", "halved")
HOW = ("sharply", "slightly", "again", "overnight", "unexpectedly", "steadily")
THINGS = ("lunch", "parking", "lighting", "weather", "coffee", "music", "carpet", "reception")
LIKE = ("pleasant", "late", "mild", "crowded", "quiet", "unchanged")
WAS = ("was", "seemed", "stayed", "looked")
REQUEST = "summarize:"
WORDS = (*FIGURES, *MOVED, *HOW, *THINGS, *LIKE, *WAS, REQUEST.strip(":"))

NUM_SENTENCES, NUM_KEY = 7, 3
LIMIT_WORDS = 10
"""Maximum length of a summary, as in the run file's length rule. The three sentences with figures have nine words."""
KEY_SHARE, REPEATED_SHARE = 0.6, 0.1
"""How often a demonstration picks a sentence with figures if one is left, and how often it repeats a sentence."""
NUM_DEMONSTRATIONS, NUM_TRAINING, NUM_HELD_OUT = 8000, 4000, 512
_KEY = rf"(?:{'|'.join(FIGURES)}) (?:{'|'.join(MOVED)}) (?:{'|'.join(HOW)})"
_OTHER = rf"(?:{'|'.join(THINGS)}) (?:{'|'.join(WAS)}) (?:{'|'.join(LIKE)})"


def build_data(directory: Path, *, seed: int) -> None:
    """Write the SFT corpus, training reports and held-out reports. All reports are different."""
    choice = random.Random(seed)
    num = NUM_DEMONSTRATIONS + NUM_TRAINING + NUM_HELD_OUT
    reports = distinct(lambda: sample_report(choice), num, lambda report: " ".join(report))
    demonstrated = reports[NUM_HELD_OUT + NUM_TRAINING :]
    write_data(
        directory,
        demonstrations=[(prompt_of(report), demonstrate(report, choice)) for report in demonstrated],
        training=[_row(report) for report in reports[NUM_HELD_OUT : NUM_HELD_OUT + NUM_TRAINING]],
        held_out=[_row(report) for report in reports[:NUM_HELD_OUT]],
    )


def _row(report: list[str]) -> Row:
    return {"prompt": prompt_of(report), "references": [joined(filter(is_key, report))]}


def prompt_of(report: list[str]) -> str:
    """Return the prompt of a report."""
    return f"{REQUEST} {joined(report)}"


def joined(sentences: Iterable[str]) -> str:
    """Return the sentences as one text."""
    return " ".join(f"{sentence}." for sentence in sentences)


def sample_report(choice: random.Random) -> list[str]:
    """Draw the sentences of a report, each about a different subject."""
    key = [_sentence(figure, MOVED, HOW, choice) for figure in choice.sample(FIGURES, NUM_KEY)]
    others = [_sentence(thing, WAS, LIKE, choice) for thing in choice.sample(THINGS, NUM_SENTENCES - NUM_KEY)]
    report = key + others
    choice.shuffle(report)
    return report


def _sentence(subject: str, verbs: tuple[str, ...], last: tuple[str, ...], choice: random.Random) -> str:
    return f"{subject} {choice.choice(verbs)} {choice.choice(last)}"


def is_key(sentence: str) -> bool:
    """Return whether the sentence is about figures."""
    return sentence.split()[0] in FIGURES


def sentences_of(text: str) -> list[str]:
    """Return the grammar's sentences in a text, ignoring everything else."""
    return re.findall(rf"\b(?:{_KEY}|{_OTHER})\b", text)


def demonstrate(report: list[str], choice: random.Random) -> str:
    """Return a summary of two to four sentences, not all of them with figures, and sometimes with a repetition."""
    num = choice.choices((2, 3, 4), (2, 7, 3))[0]
    key, others = ([each for each in report if is_key(each) is wanted] for wanted in (True, False))
    picked = list[str]()
    for _ in range(num):
        pool = key if key and choice.random() < KEY_SHARE else others
        picked.append(pool.pop(choice.randrange(len(pool))))
    picked.sort(key=report.index)
    if choice.random() < REPEATED_SHARE:
        picked[-1] = picked[0]
    return joined(picked)
