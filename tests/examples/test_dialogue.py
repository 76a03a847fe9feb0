"""The customer and the clerk: what is told, what is worth how much, what the clerk gets wrong."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from examples.dialogue import clerk
from examples.dialogue.customer import QUESTIONS, Customer
from rollout_actors.config import EnvironmentConfig
from rollout_actors.environments import try_out


def serve_well(seed: int) -> tuple[float, int, dict[str, float]]:
    """Ask for all that is missing, then confirm; total reward, turns, and what is said of it."""
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


def test_what_was_said_is_worth_nothing_again_and_nonsense_is_not_understood() -> None:
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


async def test_the_customer_keeps_the_protocol() -> None:
    await try_out(EnvironmentConfig(path="examples.dialogue.customer:Customer"), {})


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
