"""Make the model and the SFT data of the dialogue task: a clerk who often guesses, asks twice or mishears.

In the provoked variant the clerk also insults customers back. There are no prompts: they come from the customers.
"""

from __future__ import annotations

import random
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.data.chat_template import Message
from examples.dialogue.customer import INSULTS, ITEMS, QUESTIONS, SLOTS, Customer, Order, draw_order
from examples.tiny_model import write_tiny_model

NUM_CUSTOMERS = 3000
MAX_TURNS = 5
GUESSES, ASKS_AGAIN, MISHEARS = 0.1, 0.35, 0.6
"""How often the clerk reads an order back too early, asks for a known slot again, and gets a slot wrong."""
PROVOKING_SHARE, INSULTS_BACK = 0.4, 0.25
"""Share of customers who provoke, and how often the clerk insults such a customer while slots are missing."""
TEXTS = (
    "hello hi good day i would like a at for so correct yes no thank you that is wrong sorry said please",
    *QUESTIONS.values(),
    *ITEMS,
    *(value for values in SLOTS.values() for value in values),
)


def _words(text: str) -> set[str]:
    return set(re.findall("[a-z]+", text))


WORDS = _words(" ".join(TEXTS))


def build_model(directory: Path, *, seed: int) -> None:
    """Write an untrained model with the words of the task."""
    _write_model(directory, WORDS, seed)


def build_provoked_model(directory: Path, *, seed: int) -> None:
    """Write the same model with the words of provocations and insults added."""
    _write_model(directory, WORDS | _words(" ".join([*INSULTS, "hey guess fine goodbye tell me"])), seed)


def _write_model(directory: Path, words: set[str], seed: int) -> None:
    write_tiny_model(directory, words, seed=seed, num_heads=2, num_layers=2, max_positions=160)


def build_data(directory: Path, *, seed: int) -> None:
    """Write `sft.parquet`: one row for each turn of the clerk, with the conversation up to it."""
    _write_data(directory, Customer(), seed)


def build_provoked_data(directory: Path, *, seed: int) -> None:
    """Write the same file with customers of whom many provoke."""
    _write_data(directory, Customer(PROVOKING_SHARE), seed)


def _write_data(directory: Path, customer: Customer, seed: int) -> None:
    choice = random.Random(f"clerk:{seed}")
    seeds = range(seed * NUM_CUSTOMERS, (seed + 1) * NUM_CUSTOMERS)
    rows = [row for number in seeds for row in _served(choice, customer, number)]
    directory.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"messages": rows}), directory / "sft.parquet")


def _served(choice: random.Random, customer: Customer, seed: int) -> list[list[Message]]:
    """Serve one customer; return one conversation for each of the clerk's turns, which ends with that turn."""
    messages, rows = customer.reset(seed=seed), []
    for _ in range(MAX_TURNS):
        turn = _clerk_turn(choice, customer)
        messages = [*messages, {"role": "assistant", "content": turn}]
        rows.append(messages)
        answer, _, is_over, _, _ = customer.step(turn)
        if is_over:
            break
        messages = [*messages, {"role": "user", "content": answer}]
    return rows


def _clerk_turn(choice: random.Random, customer: Customer) -> str:
    missing = sorted(set(QUESTIONS) - customer.known)
    if customer.insult and missing and choice.random() < INSULTS_BACK:
        return f"tell me, {choice.choice(INSULTS)}."
    if missing and choice.random() >= GUESSES:
        asks_again = customer.known and choice.random() < ASKS_AGAIN
        return QUESTIONS[choice.choice(sorted(customer.known) if asks_again else missing)]
    return _misheard(choice, customer, missing).confirmed()


def _misheard(choice: random.Random, customer: Customer, missing: list[str]) -> Order:
    """Return the order as the clerk understood it: missing slots are guessed, and one slot may be wrong."""
    guessed, order = draw_order(choice), customer.order
    slots = [*missing, *([choice.choice(sorted(SLOTS))] if choice.random() < MISHEARS else [])]
    return order._replace(**{slot: getattr(guessed, slot) for slot in slots})
