"""Make the data of reasoning: sums of four small numbers, and demonstrations in steps with occasional mistakes.

    what is 7 + 5 - 3 + 6?    7 + 5 = 12. 12 - 3 = 9. 9 + 6 = 15. the answer is 15.

Every intermediate result is between 0 and 20. After a mistake, the demonstration continues with the wrong number.
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
"""Share of demonstrated steps with a wrong result (in fact slightly less: mistakes must keep results in range)."""
NUM_DEMONSTRATIONS, NUM_TRAINING, NUM_HELD_OUT = 4000, 4000, 512
WORDS = (*map(str, range(MAX_NUMBER + 1)), "+", "-", "=", "what", "is", "the", "answer")
Sum = tuple[int, tuple[tuple[str, int], ...]]
"""The first number, and the signs and numbers that are added or subtracted, in order."""


def build_data(directory: Path, *, seed: int) -> None:
    """Write the SFT corpus, training sums and held-out sums. All sums are different."""
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
    """Return the columns that a scorer gets."""
    return {"prompt": question(each), "references": str(results(each)[-1])}


def sample_sum(choice: random.Random) -> Sum:
    """Draw a sum whose intermediate results are all between 0 and MAX_NUMBER."""
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
    """Return the number plus or minus the other."""
    return number + other if sign == "+" else number - other


def question(each: Sum) -> str:
    """Return the prompt of a sum."""
    first, steps = each
    return f"what is {first} {' '.join(f'{sign} {other}' for sign, other in steps)}?"


def results(each: Sum) -> list[int]:
    """Return the result of each step."""
    number, steps = each
    after = []
    for sign, other in steps:
        number = applied(number, sign, other)
        after.append(number)
    return after


def worked_out(each: Sum, choice: random.Random, slip_share: float = SLIP_SHARE) -> str:
    """Return the steps and the answer, with mistakes of one or two at the rate `slip_share`."""
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
    """Return whether the number and all results after it are in range."""
    return all(0 <= each <= MAX_NUMBER for each in (number, *results((number, tuple(steps)))))
