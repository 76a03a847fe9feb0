"""Keeps prompts that the chat template wrote in a data set of texts, so that they are read as the same tokens.

A column beside the texts holds the literals of each prompt: the spans that are text although they spell control tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pyarrow as pa

from cluster.data.control_tokens import RenderedPrompt
from cluster.data.datasets import Examples

LITERALS = "prompt_literals"


def literals_column(prompts: Sequence[str]) -> dict[str, pa.Array]:
    """Return the column of the literals, by its name; empty if the prompts are plain texts."""
    rendered = [prompt for prompt in prompts if isinstance(prompt, RenderedPrompt)]
    if not rendered:
        return {}
    spans = [[list(span) for span in prompt.literals] for prompt in rendered]
    return {LITERALS: pa.array(spans, pa.list_(pa.list_(pa.int64())))}


def with_rendered_prompts(examples: Examples) -> Examples:
    """Return the examples with their prompts as the chat template wrote them; unchanged without the column."""
    literals = examples.columns.get(LITERALS)
    if literals is None or examples.form.conversational or "prompt" not in examples.form.columns:
        return examples
    prompts = [
        RenderedPrompt(text, [(int(first), int(last)) for first, last in spans or ()])
        for text, spans in zip(examples.columns["prompt"], literals, strict=True)
    ]
    return replace(examples, columns=examples.columns | {"prompt": prompts})


def are_rendered(examples: Examples) -> bool:
    """Return whether the prompts are as the chat template wrote them."""
    return any(isinstance(prompt, RenderedPrompt) for prompt in examples.columns.get("prompt", ()))
