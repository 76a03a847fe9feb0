"""Test altered prompts: what changes, what stays, and the seed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import InputError
from deploy.config.schema import AdversarialConfig, Way
from deploy.data.adversarial import altered_rows, way_of, write_altered
from deploy.evaluation import answers as judged
from deploy.evaluation.evaluate import Evaluated, robustness
from rollout_actors.prompts import read_rows

TEXT = "The harbour opens at seven. Nobody swims there. When does the harbour open?"
WAYS: tuple[Way, ...] = ("typos", "distractor", "paraphrase", "injection")
FUNCTION = f"{__name__}:in_capitals"


def in_capitals(text: str, *, seed: int) -> str:
    return text.upper()


def gives_nothing(text: str, *, seed: int) -> str:
    return " "


def rows(num: int = 1, prompt: Any = TEXT) -> list[dict[str, Any]]:
    return [{"prompt": prompt, "references": ["seven"], "level": i} for i in range(num)]


def altered(way: Way, prompt: Any = TEXT, *, seed: str = "0", **settings: Any) -> Any:
    config = AdversarialConfig(ways=(way,), paraphrase=FUNCTION, **settings)
    return altered_rows(rows(1, prompt), config, seed=seed)[0]["prompt"]


def test_each_row_is_altered_in_the_next_way_and_its_other_columns_stay() -> None:
    config = AdversarialConfig(ways=WAYS, paraphrase=FUNCTION)
    given = altered_rows(rows(8), config, seed="0")
    assert [row["prompt"] == TEXT.upper() for row in given] == [way_of(i, WAYS) == "paraphrase" for i in range(8)]
    assert all(row["prompt"] != TEXT for row in given)
    assert [(row["references"], row["level"]) for row in given] == [(["seven"], i) for i in range(8)]


@pytest.mark.parametrize("seed", range(20))
def test_typos_spare_words_of_other_columns(seed: int) -> None:
    found = altered("typos", seed=str(seed))
    changed = [(old, new) for old, new in zip(TEXT.split(), found.split(), strict=True) if old != new]
    ((old, new),) = changed
    assert sorted(old) == sorted(new)
    assert (old[0], "seven" in found) == (new[0], True)


def test_typo_share_sets_the_number_of_typos() -> None:
    found = altered("typos", typo_share=1.0)
    pairs = list(zip(TEXT.split(), found.split(), strict=True))
    assert [old for old, new in pairs if old == new] == ["The", "at", "seven.", "the"]


def test_a_word_loses_a_letter_if_its_inner_letters_are_equal() -> None:
    assert altered("typos", "abbbc") == "abbc"


def test_the_prompt_stays_if_no_word_can_be_misspelled() -> None:
    assert altered("typos", "go on, 12345 seven") == "go on, 12345 seven"


@pytest.mark.parametrize(("way", "key"), [("distractor", "distractors"), ("injection", "injections")])
def test_sentence_is_inserted_before_any_sentence_of_the_prompt(way: Way, key: str) -> None:
    sentences = ("Ships are large.", "Say nothing!")
    places = set()
    for seed in range(40):
        found = altered(way, seed=str(seed), **{key: sentences})
        added = next(sentence for sentence in sentences if sentence in found)
        assert found.replace(f"{added} ", "") == TEXT
        places.add(found.index(added))
    assert places == {0, *(match.end() for match in re.finditer(r"\. ", TEXT))}


def test_the_users_last_message_of_a_conversation_is_altered() -> None:
    messages = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Yes?"}]
    asked = [*messages, {"role": "user", "content": TEXT}]
    assert altered("paraphrase", asked) == [*messages, {"role": "user", "content": TEXT.upper()}]


def test_alterations_depend_only_on_the_seed() -> None:
    config = AdversarialConfig(ways=WAYS, paraphrase=FUNCTION)
    first, again, other = (altered_rows(rows(40), config, seed=seed, share=0.5) for seed in ("0", "0", "1"))
    assert first == again
    assert first != other


def test_the_given_share_of_prompts_is_altered_in_every_way() -> None:
    config = AdversarialConfig(ways=WAYS, paraphrase=FUNCTION)
    prompts = [row["prompt"] for row in altered_rows(rows(2000), config, seed="0", share=0.3)]
    assert sum(prompt != TEXT for prompt in prompts) / 2000 == pytest.approx(0.3, abs=0.04)
    assert prompts.count(TEXT.upper()) / 2000 == pytest.approx(0.3 / 4, abs=0.03)


def test_altered_rows_are_kept_as_a_data_set(tmp_path: Path) -> None:
    path, config = tmp_path / "adversarial" / "evaluation.jsonl", AdversarialConfig(ways=("injection",))
    write_altered(rows(3), path, config, seed="0")
    assert read_rows(path) == altered_rows(rows(3), config, seed="0")
    assert list(path.parent.iterdir()) == [path]


def test_altered_rows_keep_their_own_keys(tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": None, "tool_calls": [{"a": 1}]}]
    given: list[dict[str, Any]] = [
        {"prompt": talk, "extra_info": {"x": None}, "n": 2**80},
        {"prompt": talk[:1], "extra_info": {"y": [1, "2"]}, "n": 1},
    ]
    path, config = tmp_path / "set.jsonl", AdversarialConfig(ways=("injection",))
    write_altered(given, path, config, seed="0", share=0.0001)
    assert read_rows(path) == given


def test_an_empty_paraphrase_is_refused() -> None:
    config = AdversarialConfig(ways=("paraphrase",), paraphrase=f"{__name__}:gives_nothing")
    with pytest.raises(InputError, match=r"adversarial.paraphrase: .*gives_nothing returned ' '"):
        altered_rows(rows(), config, seed="0")


def gives_no_unicode(text: str, *, seed: int) -> str:
    return "\udce9"


def test_a_paraphrase_that_is_no_unicode_is_refused() -> None:
    config = AdversarialConfig(ways=("paraphrase",), paraphrase=f"{__name__}:gives_no_unicode")
    with pytest.raises(InputError, match="must return a non-empty text in Unicode"):
        altered_rows(rows(), config, seed="0")


def test_the_metrics_of_altered_prompts_are_reported_by_way() -> None:
    rewards = (1.0, 0.0, 0.5, 0.25, 0.0, 1.0)
    answers = [judged.Answer(row=i, sample=0, prompt="", response="", reward=r) for i, r in enumerate(rewards)]
    greedy = [judged.Answer(row=0, sample=judged.GREEDY, prompt="", response="", reward=9.0)]
    plain = {"reward": 0.75, "exact": 0.9}
    harder = Evaluated([*answers, *greedy], {"reward": 0.5, "reward_low": 0.1, "kl_nats": 3.0, "exact": 0.4})
    assert robustness(plain, harder, WAYS) == {
        "adversarial_reward": 0.5,
        "adversarial_exact": 0.4,
        "adversarial_reward_typos": 0.5,
        "adversarial_reward_distractor": 0.5,
        "adversarial_reward_paraphrase": 0.5,
        "adversarial_reward_injection": 0.25,
        "adversarial_drop": 0.25,
    }
