"""Limits that a model's config.json states."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cluster.model_folder import text_settings

CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "seq_length")
"""The keys under which architectures state their context, in the order in which they are looked for."""
STRETCHED = ("yarn", "linear")
"""Kinds of RoPE scaling whose context is the original one times the factor."""


def context_length(settings: Mapping[str, Any]) -> int | None:
    """Return the longest sequence of a model, with its RoPE scaling, or None if config.json does not say."""
    text = text_settings(settings)
    context = next((text[key] for key in CONTEXT_KEYS if text.get(key) is not None), None)
    kind, scaling = rope_scaling(text)
    original, factor = scaling.get("original_max_position_embeddings"), scaling.get("factor")
    if context is not None and kind in STRETCHED and original and factor:
        return max(int(context), int(original * factor))
    return None if context is None else int(context)


def rope_scaling(text: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """Return the kind of a model's RoPE scaling, `default` if it has none, and its settings."""
    scaling = text.get("rope_scaling") or text.get("rope_parameters") or {}
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    return str(kind), scaling
