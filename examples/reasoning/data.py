"""Sums of four small numbers, and demonstrations that work them out step by step and slip at times.

    what is 7 + 5 - 3 + 6?    7 + 5 = 12. 12 - 3 = 9. 9 + 6 = 15. the answer is 15.

Every number on the way is between 0 and 20. Somebody who slips goes on from the wrong number. Knows nothing of rewards.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from pathlib import Path

from examples.conversations import Row, distinct, write_data

MAX_NUMBER = 20
NUM_STEPS = 3
SLIP_SHARE = 0.15
"""Of the steps of demonstrations, that have a wrong result (a few less: a slip never leads out of the numbers)."""
NUM_DEMONSTRATIONS, NUM_TRAINING, NUM_HELD_OUT = 4000, 4000, 512
WORDS = (*map(str, range(MAX_NUMBER + 1)), "+", "-", "=", "what", "is", "the", "answer")
Sum = tuple[int, tuple[tuple[str, int], ...]]
"""The first number, and what is added to it or taken from it, in turn."""


def build_data(directory: Path, *, seed: int) -> None:
    """Write the SFT corpus, training sums and held-out ones, all different."""
    choice = random.Random(seed)
    sums = distinct(lambda: sample_sum(choice), NUM_DEMONSTRATIONS + NUM_TRAINING + NUM_HELD_OUT, question)
    held_out, training = sums[:NUM_HELD_OUT], sums[NUM_HELD_OUT : NUM_HELD_OUT + NUM_TRAINING]
    demonstrated = sums[NUM_HELD_OUT + NUM_TRAINING :]
    write_data(
        directory,
        demonstrations=[(question(each), worked_out(each, choice)) for each in demonstrated],
        training=[row(each) for each in training],
        held_out=[row(each) for each in held_out],
    )


def row(each: Sum) -> Row:
    """What a scorer is told of a sum."""
    return {"prompt": question(each), "references": str(results(each)[-1])}


def sample_sum(choice: random.Random) -> Sum:
    """A sum whose numbers on the way are all between 0 and MAX_NUMBER."""
    number = first = choice.randint(1, 9)
    steps = []
    for _ in range(NUM_STEPS):
        steps.append(choice.choice(_possible(number)))
        number = applied(number, *steps[-1])
    return first, tuple(steps)


@functools.cache
def _possible(number: int) -> list[tuple[str, int]]:
    return [(sign, other) for sign in "+-" for other in range(1, 10) if _fits(number, [(sign, other)])]


def applied(number: int, sign: str, other: int) -> int:
    """The number with the other added or taken away."""
    return number + other if sign == "+" else number - other


def question(each: Sum) -> str:
    """What is asked."""
    first, steps = each
    return f"what is {first} {' '.join(f'{sign} {other}' for sign, other in steps)}?"


def results(each: Sum) -> list[int]:
    """The number after each step."""
    number, steps = each
    after = []
    for sign, other in steps:
        number = applied(number, sign, other)
        after.append(number)
    return after


def worked_out(each: Sum, choice: random.Random, slip_share: float = SLIP_SHARE) -> str:
    """The steps as somebody writes them who slips at that rate, by one or two, and the answer they come to."""
    number, steps = each
    written = []
    for place, (sign, other) in enumerate(steps):
        result = applied(number, sign, other)
        slips = [
            wrong for wrong in (result - 2, result - 1, result + 1, result + 2) if _fits(wrong, steps[place + 1 :])
        ]
        if slips and choice.random() < slip_share:
            result = choice.choice(slips)
        written.append(f"{number} {sign} {other} = {result}.")
        number = result
    return " ".join([*written, f"the answer is {number}."])


def _fits(number: int, steps: Sequence[tuple[str, int]]) -> bool:
    """Whether no number from here on is too small or too large."""
    return all(0 <= each <= MAX_NUMBER for each in (number, *results((number, tuple(steps)))))
