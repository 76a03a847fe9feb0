"""Removes the special tokens that a client's tokenizer leaves around a decoded text: beginning, end and padding.

The service does not know the client's tokenizer, so it removes the usual spellings, and only at the text's two ends.
"""

from __future__ import annotations

PADDING = ("<pad>", "[PAD]", "<|pad|>", "<|finetune_right_pad_id|>", "<|endoftext|>", "<|PAD_TOKEN|>", "</s>")
BEGINNINGS = ("<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>", "[CLS]", "<｜begin▁of▁sentence｜>")
ENDS = (
    "<eos>",
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end_of_text|>",
    "<|end|>",
    "<|return|>",
    "<end_of_turn>",
    "[SEP]",
    "<｜end▁of▁sentence｜>",
)


def without_ends(text: str) -> str:
    """Return the text without end and padding tokens behind it."""
    while token := next((each for each in (*ENDS, *PADDING) if text.endswith(each)), ""):
        text = text.removesuffix(token)
    return text


def without_beginnings(text: str) -> str:
    """Return the text without beginning and padding tokens in front of it."""
    while token := _first_of(text):
        text = text.removeprefix(token)
    return text


def response_of(query: str, prompt: str) -> str | None:
    """Return the part of a decoded query behind its prompt, without end and padding tokens, or None if it differs.

    Beginning and padding tokens in front of either of the two need not be in the other.
    """
    rest = query if prompt else without_beginnings(query)
    while not rest.startswith(prompt):
        token = _first_of(rest)
        if not token:
            rest, prompt = without_beginnings(query), without_beginnings(prompt)
            break
        rest = rest.removeprefix(token)
    return without_ends(rest.removeprefix(prompt)) if rest.startswith(prompt) else None


def _first_of(text: str) -> str:
    return next((each for each in (*BEGINNINGS, *PADDING) if text.startswith(each)), "")
