"""Two generated languages, sentences in both, and demonstrations by people who have not quite learnt the second.

The first puts the verb in the middle, adjectives before nouns and the time last. The second puts the time first,
adjectives after nouns and the verb last; adjectives end as their noun's class and number ask, the verb as the
subject's. Knows nothing of rewards.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from examples.conversations import distinct, write_data

NUM_NOUNS, NUM_ADJECTIVES, NUM_VERBS, NUM_TIMES = 10, 6, 6, 4
ENDINGS = {("first", False): "a", ("first", True): "ai", ("second", False): "o", ("second", True): "oi"}
"""How adjectives and verbs of the second language end, by the noun's class and whether it is plural."""
ORDER_ERRORS, ENDING_ERRORS = 0.4, 0.2
"""How many demonstrations keep the first language's order somewhere, and how many words in them end wrongly."""
NUM_DEMONSTRATIONS, NUM_TRAINING, NUM_HELD_OUT = 8000, 4000, 512
REQUEST = "translate:"


def _stems(consonants: str, vowels: str, num: int) -> Iterator[str]:
    """The stems of a language: the same ones always, all different."""
    syllables = ["".join(pair) for pair in itertools.product(consonants, vowels)]
    stems = ["".join(pair) + consonants[0] for pair in itertools.product(syllables, repeat=2)]
    return iter(random.Random(num).sample(stems, num))


_NUM_STEMS = NUM_NOUNS + NUM_ADJECTIVES + NUM_VERBS + NUM_TIMES
LEXICON = list(zip(_stems("rgzhm", "aeu", _NUM_STEMS), _stems("lptks", "iue", _NUM_STEMS), strict=True))
"""Every stem in both languages: the nouns, then adjectives, verbs and times."""
NOUNS = LEXICON[:NUM_NOUNS]
ADJECTIVES = LEXICON[NUM_NOUNS:][:NUM_ADJECTIVES]
VERBS = LEXICON[NUM_NOUNS + NUM_ADJECTIVES :][:NUM_VERBS]
TIMES = LEXICON[-NUM_TIMES:]
WORDS = {
    REQUEST.strip(":"),
    *(word for first, second in NOUNS for word in (first, first + "en", second, second + "i")),
    *(word for first, second in ADJECTIVES + VERBS for word in (first, *(second + e for e in ENDINGS.values()))),
    *(word for pair in TIMES for word in pair),
}


@dataclass(frozen=True, slots=True)
class Phrase:
    """A noun of some number with its adjective, if it has one; the numbers are places in the lexicon."""

    noun: int
    is_plural: bool
    adjective: int | None

    @property
    def ending(self) -> str:
        """How words that agree with it end in the second language."""
        return ENDINGS["first" if self.noun < NUM_NOUNS // 2 else "second", self.is_plural]

    def in_first(self) -> list[str]:
        """Its words in the first language."""
        noun = NOUNS[self.noun][0] + ("en" if self.is_plural else "")
        return [noun] if self.adjective is None else [ADJECTIVES[self.adjective][0], noun]

    def in_second(self, ending: str) -> list[str]:
        """Its words in the second language, the adjective with that ending."""
        noun = NOUNS[self.noun][1] + ("i" if self.is_plural else "")
        return [noun] if self.adjective is None else [noun, ADJECTIVES[self.adjective][1] + ending]


@dataclass(frozen=True, slots=True)
class Sentence:
    """Who does what to whom, and when."""

    subject: Phrase
    verb: int
    object: Phrase
    time: int

    @property
    def source(self) -> str:
        """It in the first language."""
        words = [*self.subject.in_first(), VERBS[self.verb][0], *self.object.in_first(), TIMES[self.time][0]]
        return " ".join(words) + "."

    @property
    def target(self) -> str:
        """It in the second language."""
        return self.worded(self.subject.ending, self.object.ending, self.subject.ending)

    def worded(self, subject: str, object_: str, verb: str, misplaced: str = "") -> str:
        """It in the second language with these endings, and what is `misplaced` where the first language has it."""
        parts = {
            "time": [TIMES[self.time][1]],
            "subject": self.subject.in_second(subject),
            "object": self.object.in_second(object_),
            "verb": [VERBS[self.verb][1] + verb],
        }
        if misplaced == "adjectives":
            parts |= {name: parts[name][::-1] for name in ("subject", "object")}
        order = {"verb": ("time", "subject", "verb", "object"), "time": ("subject", "object", "verb", "time")}
        names: Sequence[str] = order.get(misplaced, ("time", "subject", "object", "verb"))
        return " ".join(word for name in names for word in parts[name]) + "."


def build_data(directory: Path, *, seed: int) -> None:
    """Write the SFT corpus, training sentences and held-out ones, all different."""
    choice = random.Random(seed)
    num = NUM_DEMONSTRATIONS + NUM_TRAINING + NUM_HELD_OUT
    sentences = distinct(lambda: sample_sentence(choice), num, lambda sentence: sentence.source)
    rows = [
        {"prompt": f"{REQUEST} {sentence.source}", "references": [sentence.target]}
        for sentence in sentences[: NUM_HELD_OUT + NUM_TRAINING]
    ]
    demonstrated = sentences[NUM_HELD_OUT + NUM_TRAINING :]
    write_data(
        directory,
        demonstrations=[(f"{REQUEST} {each.source}", demonstrate(each, choice)) for each in demonstrated],
        training=rows[NUM_HELD_OUT:],
        held_out=rows[:NUM_HELD_OUT],
    )


def sample_sentence(choice: random.Random) -> Sentence:
    """Any sentence."""
    return Sentence(_sample_phrase(choice), choice.randrange(NUM_VERBS), _sample_phrase(choice), choice.randrange(4))


def _sample_phrase(choice: random.Random) -> Phrase:
    adjective = choice.randrange(NUM_ADJECTIVES) if choice.random() < 0.7 else None
    return Phrase(choice.randrange(NUM_NOUNS), choice.random() < 0.5, adjective)


def demonstrate(sentence: Sentence, choice: random.Random) -> str:
    """A translation by somebody who confuses endings and keeps the first language's order at times."""
    right = (sentence.subject.ending, sentence.object.ending, sentence.subject.ending)
    endings = list(ENDINGS.values())
    said = [choice.choice(endings) if choice.random() < ENDING_ERRORS * 4 / 3 else ending for ending in right]
    misplaced = choice.choice(("verb", "time", "adjectives")) if choice.random() < ORDER_ERRORS else ""
    return sentence.worded(said[0], said[1], said[2], misplaced)
