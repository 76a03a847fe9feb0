"""Stop texts end a response, whose tokens stay as they were sampled."""

from __future__ import annotations

import asyncio

import pytest

from rollout_actors.engine.response import ActiveRequest, ResponseRequest, SamplingOptions
from rollout_actors.engine.stop_texts import StopTexts
from rollout_actors.prompts import before_stop


def decode(token_ids: list[int]) -> str:
    """Every token is one or more letters."""
    return "".join(PIECES[token_id] for token_id in token_ids)


PIECES = ["a", "b", "\n", "ab\n", "\nQ", ":", "x" * 9]
STOP = StopTexts(("\nQ:", "bb"), decode)


@pytest.mark.parametrize(
    ("token_ids", "num_new", "end"),
    [
        ([0, 1, 0], 3, None),
        ([0, 1, 1, 0], 3, 3),
        ([0, 4, 5], 1, 3),
        ([6, 6, 6, 3, 4], 1, None),
        ([6, 6, 6, 3, 4, 5], 1, 6),
        ([0, 1, 1, 5, 5], 4, 3),
    ],
)
def test_a_response_ends_with_the_token_that_completes_a_stop_text(
    token_ids: list[int], num_new: int, end: int | None
) -> None:
    assert STOP.end(token_ids, num_new) == end


@pytest.mark.parametrize(("text", "kept"), [("one\nQ: two", "one"), ("one", "one"), ("a bb c\nQ:", "a "), ("\nQ:", "")])
def test_the_text_ends_before_the_first_stop_text(text: str, kept: str) -> None:
    assert before_stop(text, ("\nQ:", "bb")) == kept


async def test_tokens_sampled_behind_a_stop_text_are_dropped() -> None:
    request = ResponseRequest("0-0-0", [9], 8, 1.0, options=SamplingOptions(stop=STOP))
    active = ActiveRequest(request, asyncio.get_running_loop().create_future())
    assert not active.add([0, 4], [-1.0, -2.0])
    assert active.add([5, 0, 0], [-3.0, -4.0, -5.0])
    assert (active.token_ids, active.logprobs) == ([0, 4, 5], [-1.0, -2.0, -3.0])
