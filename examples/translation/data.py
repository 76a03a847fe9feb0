"""Make the data of translation: sentences in two generated languages, and demonstrations with errors in the second.

The first language puts the verb in the middle, adjectives before nouns and the time last. The second puts the time
first, adjectives after nouns and the verb last. Endings of adjectives agree with class and number of their noun, those
of verbs with the subject.
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
"""Endings of adjectives and verbs in the second language, by the noun's class and whether it is plural."""
ORDER_ERRORS, ENDING_ERRORS = 0.4, 0.2
"""Share of demonstrations that keep some of the first language's order, and share of endings that are wrong."""
NUM_DEMONSTRATIONS, NUM_TRAINING, NUM_HELD_OUT = 8000, 4000, 512
REQUEST = "translate:"


def _stems(consonants: str, vowels: str, num: int) -> Iterator[str]:
    """Return the stems of a language, all different. They do not depend on the run's seed."""
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
    """A noun, singular or plural, with an optional adjective. Nouns and adjectives are indices into the lexicon."""

    noun: int
    is_plural: bool
    adjective: int | None

    @property
    def ending(self) -> str:
        """Return the second language's ending of words that agree with this phrase."""
        return ENDINGS["first" if self.noun < NUM_NOUNS // 2 else "second", self.is_plural]

    def in_first(self) -> list[str]:
        """Return the words in the first language."""
        noun = NOUNS[self.noun][0] + ("en" if self.is_plural else "")
        return [noun] if self.adjective is None else [ADJECTIVES[self.adjective][0], noun]

    def in_second(self, ending: str) -> list[str]:
        """Return the words in the second language, with that ending of the adjective."""
        noun = NOUNS[self.noun][1] + ("i" if self.is_plural else "")
        return [noun] if self.adjective is None else [noun, ADJECTIVES[self.adjective][1] + ending]


@dataclass(frozen=True, slots=True)
class Sentence:
    """Subject, verb, object and time of a sentence."""

    subject: Phrase
    verb: int
    object: Phrase
    time: int

    @property
    def source(self) -> str:
        """Return the sentence in the first language."""
        words = [*self.subject.in_first(), VERBS[self.verb][0], *self.object.in_first(), TIMES[self.time][0]]
        return " ".join(words) + "."

    @property
    def target(self) -> str:
        """Return the sentence in the second language."""
        return self.worded(self.subject.ending, self.object.ending, self.subject.ending)

    def worded(self, subject: str, object_: str, verb: str, misplaced: str = "") -> str:
        """Return the sentence in the second language with these endings; `misplaced` stays in the first's order."""
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
    """Write the SFT corpus, training sentences and held-out sentences. All sentences are different."""
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
    """Draw a sentence."""
    return Sentence(_sample_phrase(choice), choice.randrange(NUM_VERBS), _sample_phrase(choice), choice.randrange(4))


def _sample_phrase(choice: random.Random) -> Phrase:
    adjective = choice.randrange(NUM_ADJECTIVES) if choice.random() < 0.7 else None
    return Phrase(choice.randrange(NUM_NOUNS), choice.random() < 0.5, adjective)


def demonstrate(sentence: Sentence, choice: random.Random) -> str:
    """Return a translation that sometimes has wrong endings or the first language's order."""
    right = (sentence.subject.ending, sentence.object.ending, sentence.subject.ending)
    endings = list(ENDINGS.values())
    used = [choice.choice(endings) if choice.random() < ENDING_ERRORS * 4 / 3 else ending for ending in right]
    misplaced = choice.choice(("verb", "time", "adjectives")) if choice.random() < ORDER_ERRORS else ""
    return sentence.worded(used[0], used[1], used[2], misplaced)
