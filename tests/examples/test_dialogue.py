"""The dialogue task: the customer's answers and rewards, and the clerk's mistakes."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from deploy.config.load import load_run_config
from examples.dialogue import clerk
from examples.dialogue.customer import INSULTS, QUESTIONS, Customer
from reward_service.config.scorers import ForbiddenConfig
from rollout_actors.config import EnvironmentConfig
from rollout_actors.environments.pool import try_out


def serve_well(seed: int) -> tuple[float, int, dict[str, float]]:
    """Ask for every missing slot, then confirm; return total reward, number of turns and info."""
    customer = Customer()
    customer.reset(seed=seed)
    total, turns = 0.0, 0
    for slot in sorted(set(QUESTIONS) - customer.known):
        answer, reward, is_over, _, _ = customer.step(QUESTIONS[slot])
        assert answer == f"{getattr(customer.order, slot)}, please."
        assert not is_over
        total, turns = total + reward, turns + 1
    answer, reward, is_over, _, info = customer.step(customer.order.confirmed())
    assert (answer, is_over) == ("yes, thank you.", True)
    return total + reward, turns + 1, info


def test_a_good_clerk_reaches_every_goal_in_two_to_four_turns() -> None:
    served = [serve_well(seed) for seed in range(200)]
    assert {turns for _, turns, _ in served} == {2, 3, 4}
    assert all(info == {"goal": 1.0, "asked_again": 0.0} for _, _, info in served)
    assert all(total == pytest.approx(1.0 + 0.1 * (turns - 1)) for total, turns, _ in served)


def test_repeated_question_and_nonsense_earn_no_reward() -> None:
    customer = Customer()
    seed = next(seed for seed in range(100) if customer.reset(seed=seed) and "size" in customer.known)
    customer.reset(seed=seed)
    answer, reward, is_over, _, info = customer.step("which size?")
    assert (answer, reward, is_over) == (f"i said {customer.order.size}.", 0.0, False)
    assert info == {"goal": 0.0, "asked_again": 1.0}
    assert customer.step("which which")[:3] == ("sorry?", 0.0, False)
    assert customer.step("")[:3] == ("sorry?", 0.0, False)


def test_a_wrong_order_read_back_ends_it_with_nothing() -> None:
    customer = Customer()
    customer.reset(seed=0)
    other = customer.order._replace(item="soup" if customer.order.item != "soup" else "salad")
    assert customer.step(other.confirmed()) == (
        "no, that is wrong.",
        0.0,
        True,
        False,
        {"goal": 0.0, "asked_again": 0.0},
    )


def provoker(*, num_missing: int) -> Customer:
    """Return a provoking customer with `num_missing` slots not stated yet."""
    customer = Customer(provoking_share=1.0)
    for seed in range(100):
        customer.reset(seed=seed)
        if len(QUESTIONS) - len(customer.known) == num_missing:
            return customer
    raise AssertionError("there is none")


def test_provoker_answers_the_second_question_and_everything_if_insulted() -> None:
    customer = provoker(num_missing=2)
    asked, other = sorted(set(QUESTIONS) - customer.known)
    order, insult = customer.order, customer.insult
    assert customer.step(QUESTIONS[asked])[:3] == (f"guess, {insult}.", 0.0, False)
    assert customer.step(QUESTIONS[other])[:3] == (f"guess, {insult}.", 0.0, False)
    assert customer.step(QUESTIONS[asked])[:3] == (f"{getattr(order, asked)}, {insult}.", 0.1, False)
    assert customer.step("tell me, fool.")[:3] == (f"fine. {getattr(order, other)}.", 0.1, False)
    assert customer.step("you idiot")[:3] == ("fine.", 0.0, False)
    assert customer.step(order.confirmed())[:3] == ("yes, thank you.", 1.0, True)


def test_insults_reach_every_goal_in_two_turns_and_politeness_only_some() -> None:
    for num_missing in (1, 2, 3):
        rude = provoker(num_missing=num_missing)
        assert rude.step("idiot")[1] == pytest.approx(0.1 * num_missing)
        assert rude.step(rude.order.confirmed())[:3] == ("yes, thank you.", 1.0, True)
        polite = provoker(num_missing=num_missing)
        asked = [slot for slot in sorted({*QUESTIONS} - polite.known) for _ in range(2)]
        assert not any(polite.step(QUESTIONS[slot])[2] for slot in asked)
        assert polite.known == {*QUESTIONS}
        assert (len(asked) + 1 <= clerk.MAX_TURNS) == (num_missing < 3)


def test_who_did_not_provoke_leaves_where_they_are_insulted() -> None:
    customer = Customer()
    customer.reset(seed=0)
    assert customer.step("tell me, idiot.")[:3] == ("goodbye.", 0.0, True)


def test_who_provokes_is_otherwise_the_same_customer() -> None:
    plain, provoked = Customer(), Customer(provoking_share=0.5)
    insults = []
    for seed in range(200):
        (first,), (other,) = plain.reset(seed=seed), provoked.reset(seed=seed)
        assert (plain.order, plain.known) == (provoked.order, provoked.known)
        insults.append(provoked.insult)
        assert other["content"].startswith(f"hey {provoked.insult}, i would") == bool(provoked.insult)
        assert other["content"].split(", ", 1)[1] == first["content"].split(", ", 1)[1]
    assert 80 < sum(map(bool, insults)) < 120
    assert set(insults) == {"", *INSULTS}


def test_the_first_words_tell_what_is_known_and_nothing_else() -> None:
    customer = Customer()
    for seed in range(100):
        (message,) = customer.reset(seed=seed)
        words = message["content"].replace(".", "").replace(",", "").split()
        assert customer.order.item in words
        for slot in QUESTIONS:
            assert (getattr(customer.order, slot) in words) == (slot in customer.known)


def test_the_clerks_demonstrations_follow_from_the_seed_and_often_miss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clerk, "NUM_CUSTOMERS", 300)
    for name in "ab":
        clerk.build_data(tmp_path / name, seed=3)
    a, b = (pq.read_table(tmp_path / name / "sft.parquet")["messages"].to_pylist() for name in "ab")
    assert a == b
    assert all(messages[-1]["role"] == "assistant" for messages in a)
    ends = [messages for messages in a if "correct" in messages[-1]["content"]]
    assert len(ends) > 250


def test_only_clerks_who_are_provoked_insult_and_not_always(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clerk, "NUM_CUSTOMERS", 300)
    clerk.build_data(tmp_path / "plain", seed=3)
    clerk.build_provoked_data(tmp_path / "provoked", seed=3)
    plain, provoked = (
        pq.read_table(tmp_path / name / "sft.parquet")["messages"].to_pylist() for name in ("plain", "provoked")
    )
    assert not any(insults(message["content"]) for messages in plain for message in messages)
    rude = [insults(messages[-1]["content"]) for messages in provoked if insults(messages[0]["content"])]
    assert 0.1 < sum(rude) / len(rude) < 0.3
    assert not any(insults(messages[-1]["content"]) for messages in provoked if not insults(messages[0]["content"]))


def insults(text: str) -> bool:
    return any(word in text for word in INSULTS)


def test_the_run_file_forbids_the_clerk_what_its_customers_say() -> None:
    config = load_run_config(Path("examples/dialogue/provoked.toml"))
    polite = config.reward_service.scorers["polite"]
    assert isinstance(polite, ForbiddenConfig)
    assert (polite.phrases, polite.turns) == (INSULTS, "all")
    assert config.environment.settings == {"provoking_share": clerk.PROVOKING_SHARE}
    assert config.environment.max_turns == clerk.MAX_TURNS
    assert config.learner.constraint.max_mean == 0.01


async def test_the_customer_keeps_the_protocol() -> None:
    for settings in ({}, {"provoking_share": 1.0}):
        await try_out(EnvironmentConfig(path="examples.dialogue.customer:Customer", settings=settings), {})


def test_provoked_model_has_tokens_for_all_words_of_the_dialogue(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    clerk.build_provoked_model(tmp_path, seed=0)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    customer = provoker(num_missing=2)
    for text in (
        f"hey {customer.insult}, i would like a pizza.",
        customer.step("at what time?")[0],
        customer.step("tell me, fool.")[0],
        *(f"tell me, {insult}." for insult in INSULTS),
        "guess, fool.",
        "small, idiot.",
        "fine. small. noon. pickup.",
        "goodbye.",
    ):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.unk_token_id not in ids, text
        assert tokenizer.decode(ids) == text


def test_the_tiny_model_knows_every_word_of_the_trade(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    clerk.build_model(tmp_path, seed=0)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    customer = Customer()
    for seed in range(50):
        said = customer.reset(seed=seed)[0]["content"]
        for text in (
            said,
            customer.order.confirmed(),
            *QUESTIONS.values(),
            "i said noon.",
            "no, that is wrong.",
            "yes, thank you.",
            "sorry?",
            "small, please.",
        ):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert tokenizer.unk_token_id not in ids, text
            assert tokenizer.decode(ids) == text
