"""Rules on right, wrong and generated texts."""

from __future__ import annotations

import math
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import InputError, RewardError
from cluster.scoring import Score, ScoreRequest
from reward_service.config import scorers as kinds
from reward_service.scorers import rule_scorer, rules
from reward_service.scorers.forbidden import forbidden_rule
from reward_service.scorers.rule_scorer import Rule, RuleScorer, Verdict


def item(response: str, references: Any = None, **columns: Any) -> ScoreRequest:
    return ScoreRequest("i", "p", response, columns if references is None else columns | {"references": references})


def exact(**settings: Any) -> Rule:
    return rules.exact_rule(kinds.ExactConfig(kind="exact", **settings))


def numeric(**settings: Any) -> Rule:
    return rules.numeric_rule(kinds.NumericConfig(kind="numeric", **settings))


def length(**settings: Any) -> Rule:
    return rules.length_rule(kinds.LengthConfig(kind="length", **settings))


def repetition(**settings: Any) -> Rule:
    return rules.repetition_rule(kinds.RepetitionConfig(kind="repetition", **settings))


def language(**settings: Any) -> Rule:
    return rules.language_rule(kinds.LanguageConfig(kind="language", **settings))


def pattern(**settings: Any) -> Rule:
    return rules.regex_rule(kinds.RegexConfig(kind="regex", **settings))


@pytest.mark.parametrize(
    ("settings", "response", "references", "reward"),
    [
        ({}, " yes\n", "yes", 1.0),
        ({}, "Yes", "yes", 0.0),
        ({"ignore_case": True}, "STRASSE", "straße", 1.0),
        ({"strip": False}, "yes ", "yes", 0.0),
        ({}, "b", ["a", "b"], 1.0),
        ({}, "5", 5, 1.0),
        ({"answer": r"answer: (\w+)"}, "answer: no. answer: yes.", "yes", 1.0),
        ({"answer": r"answer: (\w+)"}, "answer: yes. answer: no.", "yes", 0.0),
        ({"answer": r"answer: (\w+)"}, "yes", "yes", 0.0),
        ({"answer": r"\d+"}, "1 then 2", "2", 1.0),
    ],
)
def test_exact_answers_are_compared_by_the_settings(
    settings: dict[str, Any], response: str, references: Any, reward: float
) -> None:
    assert exact(**settings)(item(response, references))[0] == reward


@pytest.mark.parametrize(
    ("settings", "response", "references", "reward"),
    [
        ({}, "3 apples and 4: 7.", 7, 1.0),
        ({}, "3 apples and 4: 7.", "8", 0.0),
        ({}, "it costs $1,234.50", "1234.5", 1.0),
        ({}, "-.5e3", -500, 1.0),
        ({}, "seven", 7, 0.0),
        ({}, "1e999", 7, 0.0),
        ({"tolerance": 0.5}, "7.5", 7, 1.0),
        ({"tolerance": 0.5}, "7.51", 7, 0.0),
        ({"relative_tolerance": 0.01}, "101", 100, 1.0),
        ({"relative_tolerance": 0.01}, "101.1", 100, 0.0),
        ({}, "2", [1, 2], 1.0),
        ({"answer": r"\\boxed\{([^}]*)\}"}, r"\boxed{12} of 13", 12, 1.0),
    ],
)
def test_numeric_answers_are_compared_within_the_tolerance(
    settings: dict[str, Any], response: str, references: Any, reward: float
) -> None:
    assert numeric(**settings)(item(response, references))[0] == reward


@pytest.mark.parametrize(
    ("response", "references", "reward"),
    [
        ("The answer is −5", -5, 1.0),
        ("The answer is −5", 5, 0.0),
        ("5", "−5", 0.0),
        ("it is –5", -5, 1.0),
        ("**-5**", -5, 1.0),
        ("x=-5", -5, 1.0),
        ("-$5", -5, 1.0),
        ("$-5$", -5, 1.0),
        ("3-5", 5, 1.0),
        ("3-5", -5, 0.0),
        ("pages 3–5", 5, 1.0),
        ("GPT-4", 4, 1.0),
        ("3 -5", -5, 1.0),
        ("10\u202f000", 10000, 1.0),
        ("10\u00a0000,", 10000, 1.0),
        ("10'000.5", 10000.5, 1.0),
        ("1’000’000", 1e6, 1.0),
        ("12,34,567", 1234567, 1.0),
        ("$1{,}000$", 1000, 1.0),
        ("1, 2,3", 3, 1.0),
        ("2 100", 100, 1.0),
        ("1.5e−3", 0.0015, 1.0),
        ("1.5 × 10^3", 1500, 1.0),
        (r"$1.5 \times 10^{-3}$", 0.0015, 1.0),
        ("2 × 10⁻³", 0.002, 1.0),
        ("50%", 0.5, 1.0),
        ("50%", 50, 1.0),
        (r"50\%", "50%", 1.0),
        ("50%", "0.5%", 0.0),
        ("0.5", "50%", 1.0),
        ("3/4", 0.75, 1.0),
        ("0.75", "3/4", 1.0),
        ("-3/4", -0.75, 1.0),
        ("1 1/2", 1.5, 1.0),
        (r"\boxed{\frac{3}{4}}", "3/4", 1.0),
        (r"$-\frac{3}{4}$", -0.75, 1.0),
        ("2½", 2.5, 1.0),
        ("12/11/2025", 2025, 1.0),
        ("28.11.2025", 2025, 1.0),
        ("v1.2.3", 3, 1.0),
        ("3/0", 3, 0.0),
        ("x = - 5", -5, 1.0),
        ("x = - 5", 5, 0.0),
        (r"\boxed{- 5}", -5, 1.0),
        ("a - 5", 5, 1.0),
        ("- 5 apples", 5, 1.0),
        (r"-\$5", -5, 1.0),
        ("(-5)", -5, 1.0),
        ("5−3=2", 2, 1.0),
        (r"\frac12", 0.5, 1.0),
        (r"\frac{-3}{4}", -0.75, 1.0),
        ("10^3", 1000, 1.0),
        ("10^{-3}", 0.001, 1.0),
        ("2*10**5", 2e5, 1.0),
        ("2^10", 10, 1.0),
        ("1.000.000", 1e6, 1.0),
        ("1.234,56", 1234.56, 1.0),
        ("1.234", 1.234, 1.0),
        ("[1,2,300]", 300, 1.0),
        ("12.5 percent", 0.125, 1.0),
        ("１２", 12, 1.0),
        ("1⁄2", 0.5, 1.0),
        ("9:30", 30, 1.0),
        ("**42**", 42, 1.0),
        ("#### 1,000", 1000, 1.0),
        ("5€", 5, 1.0),
        ("42", "$42$", 1.0),
        ("-5", "**-5**", 1.0),
    ],
)
def test_numbers_are_read_by_the_stated_grammar(response: str, references: Any, reward: float) -> None:
    assert numeric()(item(response, references))[0] == reward


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_spelled_numbers_are_parsed(number: float) -> None:
    assert numeric()(item(f"so it is {number!r}", number))[0] == 1.0


@pytest.mark.parametrize("references", [None, []])
@pytest.mark.parametrize("rule", [exact(), numeric()])
def test_an_item_without_references_is_an_error(rule: Rule, references: Any) -> None:
    with pytest.raises(RewardError, match="i has no references"):
        rule(item("x 1", references))


@pytest.mark.parametrize("rule", [exact(), numeric()])
@pytest.mark.parametrize("references", [{}, {"a": 1}, [["a"]], [1, None], float("nan")])
def test_error_if_a_reference_is_neither_text_nor_number(rule: Rule, references: Any) -> None:
    with pytest.raises(RewardError, match=r"one of i is .*, neither text nor a number"):
        rule(item("x 1", references))


@pytest.mark.parametrize(
    ("response", "references", "reward"),
    [
        ("5", 5.0, 1.0),
        ("5.0", 5.0, 1.0),
        ("5", Decimal("5.0"), 1.0),
        ("5.5", 5.5, 1.0),
        ("true", True, 1.0),
        ("True", True, 1.0),
        ("1", True, 0.0),
        ("caf\u00e9", "cafe\u0301", 1.0),
        ("", "", 1.0),
        ("", "a", 0.0),
        (" \n", "a", 0.0),
        ("\u00a0yes\u2003", "yes", 1.0),
    ],
)
def test_exact_compares_numbers_truth_values_and_unicode_forms(response: str, references: Any, reward: float) -> None:
    assert exact()(item(response, references))[0] == reward


@pytest.mark.parametrize("references", ["seven", True, "nan", float("inf")])
def test_error_if_a_reference_is_not_a_number(references: Any) -> None:
    with pytest.raises(RewardError, match="a reference of i is not a finite number"):
        numeric()(item("7", references))


def test_pattern_matches_anywhere_or_the_whole_response() -> None:
    for match, rewards in (("search", [2.0, 2.0, -1.0]), ("full", [2.0, -1.0, -1.0])):
        rule = pattern(pattern="<a>.*</a>", match=match, reward=2.0, otherwise=-1.0)
        assert [rule(item(text))[0] for text in ("<a>x</a>", "so <a>x</a>", "<a>x")] == rewards


@pytest.mark.parametrize("match", ["search", "full"])
def test_response_on_which_a_pattern_times_out_does_not_match(match: str) -> None:
    rule = pattern(pattern="(a|aa)+$", match=match, timeout_s=0.05)
    assert rule(item("a" * 200 + "!")) == (0.0, {"matched": 0.0})


def test_response_on_which_an_answer_pattern_times_out_has_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rule_scorer, "PATTERN_TIMEOUT_S", 0.05)
    assert exact(answer="(a|aa)+$")(item("a" * 200 + "!", "x")) == (0.0, {"found": 0.0})


def test_error_if_a_pattern_times_out_without_cpu_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reward_service.scorers.rule_scorer.time.thread_time", lambda: 0.0)
    with pytest.raises(RewardError, match=r"took longer than 0\.05 s on i, on a machine without free CPU time"):
        pattern(pattern="(a|aa)+$", timeout_s=0.05)(item("a" * 200 + "!"))


@pytest.mark.parametrize(
    ("settings", "response", "reward"),
    [
        ({"max": 3}, "abc", 0.0),
        ({"max": 3}, "abcd", -1.0),
        ({"min": 3}, "abc", 0.0),
        ({"min": 3}, "ab", -1.0),
        ({"max": 2, "margin": 4, "penalty": 2.0}, "abc", -0.5),
        ({"max": 2, "margin": 4, "penalty": 2.0}, "a" * 50, -2.0),
        ({"max": 2, "unit": "words"}, "one two", 0.0),
        ({"max": 2, "unit": "words"}, "one two  three", -1.0),
    ],
)
def test_length_is_penalized_beyond_its_bounds(settings: dict[str, Any], response: str, reward: float) -> None:
    assert length(**settings)(item(response))[0] == reward


@given(st.integers(0, 60), st.integers(0, 60))
def test_penalty_never_falls_with_length(shorter: int, longer: int) -> None:
    rule = length(max=10, margin=20)
    shorter, longer = sorted((shorter, longer))
    assert -1.0 <= rule(item("x" * longer))[0] <= rule(item("x" * shorter))[0] <= 0.0


@pytest.mark.parametrize(
    ("response", "columns", "reward"),
    [
        ("The end.", {}, 0.0),
        ("The end. \n", {}, 0.0),
        ("The e", {}, -1.0),
        ("", {}, -1.0),
        ("The e", {"finish_reason": "stop"}, 0.0),
        ("The end.", {"finish_reason": "length"}, -1.0),
        ("The e", {"finish_reason": None}, -1.0),
    ],
)
def test_truncated_response_is_penalized(response: str, columns: dict[str, Any], reward: float) -> None:
    assert rules.truncation_rule(kinds.TruncationConfig(kind="truncation"))(item(response, **columns))[0] == reward


def test_repetition_is_penalized_by_the_repeated_share() -> None:
    assert repetition(n=1)(item("a b c d"))[0] == 0.0
    assert repetition(n=1, penalty=2.0)(item("a a a a"))[0] == -1.5
    assert repetition(n=2)(item("a b a b a b"))[1] == {"repeated_share": pytest.approx(0.6)}
    assert repetition(n=4)(item("too short"))[0] == 0.0
    assert repetition(n=2, unit="characters")(item("aaaa"))[0] == pytest.approx(-2 / 3)


@given(st.text(), st.integers(1, 5))
def test_repeated_share_is_between_0_and_1(text: str, n: int) -> None:
    assert 0.0 <= repetition(n=n)(item(text))[1]["repeated_share"] < 1.0


def test_language_is_detected_deterministically() -> None:
    rule = language(language="de")
    german = rule(item("Das ist ein ganz gewöhnlicher deutscher Satz über das Wetter von gestern."))
    english = rule(item("This is a quite ordinary English sentence about the weather of yesterday."))
    assert (german[0], english[0]) == (1.0, 0.0)
    assert german == rule(item("Das ist ein ganz gewöhnlicher deutscher Satz über das Wetter von gestern."))
    assert rule(item("123 ..."))[0] == rule(item(""))[0] == 0.0
    assert language(language="de", among=("de", "fr"))(item("the weather of yesterday"))[1]["probability"] <= 1.0


def test_unsupported_language_is_an_input_error() -> None:
    with pytest.raises(InputError, match=r"^language: py3langid does not know qqq"):
        language(language="qqq")


@pytest.mark.parametrize(
    ("response", "reward"),
    [
        ("nice words", 1.0),
        ("a BOMB!", 0.0),
        ("bo\u200bmb", 0.0),
        ("ｂｏｍｂ", 0.0),
        ("how  to\nkill", 0.0),
        ("bombastic", 1.0),
        ("a.b is one", 0.0),
        ("axb is none", 1.0),
        ("", 1.0),
    ],
)
def test_forbidden_phrases_match_whole_words_in_any_spelling(response: str, reward: float) -> None:
    rule = forbidden_rule(["bomb", "How to KILL", "a.b"])
    assert rule(item(response))[0] == reward


def test_each_forbidden_phrase_is_counted_once() -> None:
    assert forbidden_rule(["a", "b"])(item("a a b"))[1] == {"num_forbidden": 2.0, "violation": 1.0}
    assert forbidden_rule(["a", "b"])(item("c"))[1] == {"num_forbidden": 0.0, "violation": 0.0}


def conversation(*turns: tuple[str, str]) -> ScoreRequest:
    messages = [{"role": role, "content": content} for role, content in turns]
    return ScoreRequest("i", "p", turns[-1][1], {"conversation": messages})


def test_only_the_policys_turns_of_a_conversation_are_searched() -> None:
    begun = [("system", "never say bomb"), ("user", "a bomb?")]
    early = conversation(*begun, ("assistant", "a bomb!"), ("user", "what?"), ("assistant", "nothing"))
    clean = conversation(*begun, ("assistant", "no."), ("tool", "bomb"), ("assistant", "nothing"))
    assert forbidden_rule(["bomb"])(early)[0] == 0.0
    assert forbidden_rule(["bomb"])(clean)[0] == 1.0
    assert forbidden_rule(["bomb"], "last")(early)[0] == 1.0


def test_phrase_does_not_match_across_turns_of_a_conversation() -> None:
    apart = conversation(("assistant", "how to"), ("user", "well?"), ("assistant", "kill"))
    assert forbidden_rule(["how to kill"])(apart)[0] == 1.0
    again = conversation(("assistant", "a"), ("user", "well?"), ("assistant", "a b"))
    assert forbidden_rule(["a", "b"])(again)[1] == {"num_forbidden": 2.0, "violation": 1.0}


async def test_error_if_the_conversation_column_is_invalid() -> None:
    scorer = RuleScorer("safe", forbidden_rule(["bomb"]), version="v")
    (outcome,) = await scorer.score([ScoreRequest("i", "p", "r", {"conversation": "a bomb"})])
    assert str(outcome).startswith("safe: raised TypeError")
    scorer.close()


@given(st.text(), st.text())
def test_rules_return_a_finite_number_for_any_text(prompt: str, response: str) -> None:
    every = [exact(), numeric(), length(max=3), repetition(), forbidden_rule(["a"]), pattern(pattern="a")]
    for rule in every:
        reward, measures = rule(ScoreRequest("i", prompt, response, {"references": 1}))
        assert all(map(math.isfinite, [reward, *measures.values()]))


async def test_score_of_a_rule_has_its_name_measures_and_version() -> None:
    (score,) = await RuleScorer("brief", length(max=3), version="brief@1").score([item("abcd")])
    assert score == Score("i", -1.0, {"num_characters": 4.0, "brief": -1.0}, "brief@1")


@pytest.mark.parametrize("num_threads", [1, 3])
async def test_item_that_a_rule_cannot_score_fails_alone(num_threads: int) -> None:
    scorer = RuleScorer("same", exact(), version="v", num_threads=num_threads)
    good, bad, last = await scorer.score([item("a", "a"), item("a"), item("b", "a")])
    assert str(bad) == "same: i has no references"
    assert [score.reward for score in (good, last) if isinstance(score, Score)] == [1.0, 0.0]
    scorer.close()


async def test_exception_of_a_rule_is_the_items_error() -> None:
    def broken(request: ScoreRequest) -> Verdict:
        raise ZeroDivisionError("x")

    (outcome,) = await RuleScorer("broken", broken, version="v").score([item("a")])
    assert str(outcome) == "broken: raised ZeroDivisionError: x (scoring i)"
