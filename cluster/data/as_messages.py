"""Turns examples of plain texts into conversations, for models that are trained on conversations."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from cluster.data.control_tokens import RenderedPrompt
from cluster.data.datasets import Examples

ROLES = {"prompt": "user", "completion": "assistant", "chosen": "assistant", "rejected": "assistant"}


def as_conversations(examples: Examples) -> Examples:
    """Return the examples with each text as a message: prompts by the user, all others by the assistant.

    Conversations, and texts that a chat template wrote, are returned as they are.
    """
    is_rendered = any(isinstance(text, RenderedPrompt) for text in examples.columns.get("prompt", ()))
    if examples.form.conversational or is_rendered:
        return examples

    def messages(column: str) -> list[Any]:
        return [as_conversation(text, ROLES[column]) for text in examples.columns[column]]

    texts = {column: messages(column) for column in examples.form.columns if column in ROLES}
    return replace(examples, form=replace(examples.form, conversational=True), columns=examples.columns | texts)


def as_conversation(text: str, role: str = "user") -> list[dict[str, Any]]:
    """Return a text as a conversation of one message."""
    return [{"role": role, "content": text}]
