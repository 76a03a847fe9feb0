"""Check that learner and engine can both train and sample the model of a folder, before either is started.

Reads config.json, tokenizer.json and the headers of the weight files. Imports neither torch nor transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluster.errors import InputError
from cluster.model_folder import tensor_shapes, text_settings
from cluster.model_limits import rope_scaling
from learner.config import LoraConfig

NUM_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts", "num_experts_per_tok")
SCALES = {"final_logit_softcapping": None, "logit_scale": 1.0, "logits_scaling": 1.0}
"""Settings that change the logits after the output embedding -> the value without effect."""
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
POSITIONS = ("wpe.weight", "embed_positions.weight", "position_embeddings.weight")
HEADS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
"""Endings of the names of architectures that generate text."""


def check_architecture(settings: Mapping[str, Any], folder: Path, *, has_weights: bool = True) -> None:
    """Raise InputError naming what of a model is not supported: its kind, its numbers or its weight files.

    Without `has_weights`, as for a model of the Hub that is not downloaded yet, the weight files are not looked at.
    """
    text = text_settings(settings)
    _require_policy(settings, folder)
    for key in NUM_EXPERTS:
        if isinstance(num := text.get(key), int) and num > 1:
            raise InputError(str(folder), f"is a mixture of experts ({key} = {num}), which is not supported yet")
    for key, without_effect in SCALES.items():
        if text.get(key) not in (None, without_effect):
            raise InputError(str(folder), f"scales or caps its logits ({key} = {text[key]}), which is not supported")
    shapes = tensor_shapes(folder) if has_weights else {}
    vocabulary = text.get("vocab_size")
    for name, shape in shapes.items():
        if name.endswith(EMBEDDINGS) and isinstance(vocabulary, int) and shape[0] != vocabulary:
            what = f"vocab_size is {vocabulary}, but {name} has {shape[0]} rows: save model and config.json together"
            raise InputError(str(folder / "config.json"), what)


def _require_policy(settings: Mapping[str, Any], folder: Path) -> None:
    """Raise InputError unless the weights are those of a decoder with an output embedding, not quantised."""
    quantised = settings.get("quantization_config")
    if quantised:
        method = quantised.get("quant_method", "unknown method") if isinstance(quantised, Mapping) else quantised
        what = f"its weights are quantised ({method}), and training needs whole ones: use the original model"
        raise InputError(str(folder), what)
    if settings.get("is_encoder_decoder"):
        raise InputError(str(folder), "is an encoder-decoder model; a policy is a causal language model")
    names = settings.get("architectures") or []
    if names and not str(names[0]).endswith(HEADS):
        what = f"{names[0]} generates no text; a policy is a causal language model, such as LlamaForCausalLM"
        raise InputError(str(folder), what)


def check_adapters(lora: LoraConfig, settings: Mapping[str, Any], folder: Path) -> None:
    """Raise InputError naming a target module of the adapters that the model lacks or that is no linear layer."""
    if not lora.rank or not lora.target_modules:
        return
    shapes = {name.removesuffix(".weight"): shape for name, shape in tensor_shapes(folder).items()}
    vocabulary = text_settings(settings).get("vocab_size")
    linear = {name for name, shape in shapes.items() if _is_linear(name, shape, vocabulary)}
    known = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
    for target in lora.target_modules:
        named = [name for name in shapes if f".{name}".endswith(f".{target}")]
        if not named:
            raise InputError("learner.lora.target_modules", f"{folder} has no layer {target!r}; it has {known}")
        if others := [name for name in named if name not in linear]:
            what = f"{others[0]} is no linear layer, and only those can have adapters: choose among {known}"
            raise InputError("learner.lora.target_modules", what)


def _is_linear(name: str, shape: tuple[int, ...], vocabulary: Any) -> bool:
    """Return whether a weight is a linear layer's: a matrix that is neither an embedding nor the output layer."""
    is_embedding = f"{name}.weight".endswith((*EMBEDDINGS, *POSITIONS)) or name.endswith(("lm_head", "embed_out"))
    return len(shape) == 2 and not is_embedding and shape[0] != vocabulary and not name.endswith(".bias")


def check_rope(settings: Mapping[str, Any], folder: Path, longest: int) -> None:
    """Raise InputError for a RoPE scaling that depends on the length of each sequence.

    The engine chooses it once, for its longest sequence, and the learner for each batch: they would disagree.
    """
    text = text_settings(settings)
    kind, scaling = rope_scaling(text)
    context = text.get("max_position_embeddings")
    original = text.get("original_max_position_embeddings", scaling.get("original_max_position_embeddings", context))
    if kind in ("dynamic", "longrope", "su") and original is not None and longest > int(original):
        what = (
            f"sequences may have {longest} tokens, beyond the {original} up to which RoPE scaling {kind!r} is constant"
        )
        raise InputError(str(folder), f"{what}: lower rollout_actors.max_prompt_tokens or max_response_tokens")
