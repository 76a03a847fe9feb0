"""Special tokens around the queries of /get_reward."""

from __future__ import annotations

import pytest

from reward_service.http.foreign_schemas import GetRewardRequest


@pytest.mark.parametrize(
    ("query", "prompt", "response"),
    [
        ("2+2=4</s>", "2+2=", "4"),
        ("<s>2+2=4</s><pad><pad>", "2+2=", "4"),
        ("<pad><pad><s>2+2=4</s>", "2+2=", "4"),
        ("<s>2+2=4</s>", "<s>2+2=", "4"),
        ("<s><s>2+2=4", "<s>2+2=", "4"),
        ("2+2=4", "<s>2+2=", "4"),
        ("<|im_start|>user\nhi<|im_end|>\nhello<|im_end|><|endoftext|>", "<|im_start|>user\nhi<|im_end|>\n", "hello"),
        ("a<tool></s>", "a", "<tool>"),
        ("a b </s>", "a", " b "),
        ("ax</s>y", "a", "x</s>y"),
        ("a</s>", "a", ""),
    ],
)
def test_special_tokens_around_a_query_are_removed(query: str, prompt: str, response: str) -> None:
    (item,) = GetRewardRequest(query=[query], prompts=[prompt]).items()
    assert (item.prompt, item.response) == (prompt, response)


def test_special_tokens_are_removed_if_there_are_no_prompts() -> None:
    (item,) = GetRewardRequest(query=["<s>2+2=4</s><pad>"]).items()
    assert (item.prompt, item.response) == ("", "2+2=4")


def test_error_if_a_query_does_not_start_with_its_prompt() -> None:
    with pytest.raises(ValueError, match="query 0 does not start with its prompt"):
        GetRewardRequest(query=["<s>2+3=4</s>"], prompts=["2+2="])
