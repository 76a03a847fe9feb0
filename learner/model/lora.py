"""Adds, merges and writes low-rank adapters (LoRA, arXiv:2106.09685) through peft.

Only the adapters are trained; the model without them is the reference. They are added in place, so that the model stays
the same transformers model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from cluster.errors import InputError
from learner.config import LoraConfig as LoraSettings
from learner.distributed.ranks import whole

ADAPTER = "default"
ADAPTER_FOLDER = "adapter"
"""The folder of the adapters in a model's folder."""
_BASE = ".base_layer"


def add_adapters(model: Any, settings: LoraSettings, *, seed: int) -> None:
    """Add an adapter to every linear layer with a target name, or to all but the head.

    Everything else is frozen.

    An adapter's second matrix starts at 0, so that the output does not change. Raises InputError if no module has a
    target name, or if one with such a name is not a linear layer.
    """
    targets: Any = list(settings.target_modules) or "all-linear"
    config = _peft_config(settings, targets)
    config.fan_in_fan_out = any(isinstance(module, Conv1D) for module in model.modules())
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            inject_adapter_in_model(config, model, adapter_name=ADAPTER)
        except ValueError as error:
            raise InputError("learner.lora.target_modules", str(error).splitlines()[0]) from error
    _require_linear(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    model.eval()


def _require_linear(model: nn.Module) -> None:
    """Raise InputError naming an adapted module that is no linear layer: its weight could not be merged."""
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and not isinstance(base := module.get_base_layer(), nn.Linear | Conv1D):
            what = f"{name} is a {type(base).__name__}: adapters are for linear layers only"
            raise InputError("learner.lora.target_modules", what)


def num_parameters(model: nn.Module) -> int:
    """Return the number of weights without those of the adapters."""
    return sum(parameter.numel() for name, parameter in model.named_parameters() if ".lora_" not in name)


def _peft_config(settings: LoraSettings, targets: Any) -> LoraConfig:
    alpha: Any = settings.alpha
    return LoraConfig(
        r=settings.rank, lora_alpha=alpha, target_modules=targets, lora_dropout=0.0, bias="none", task_type="CAUSAL_LM"
    )


def adapter_tensors(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield the adapters' whole tensors by the names that peft and vLLM read. Collective if sharded."""
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            yield f"base_model.model.{name.replace(f'.{ADAPTER}.', '.')}", whole(parameter.detach())


def has_inputs_first(model: nn.Module) -> bool:
    """Return whether adapted weights have the inputs first, as those of a Conv1D."""
    return any(isinstance(m, LoraLayer) and isinstance(m.get_base_layer(), Conv1D) for m in model.modules())


def write_adapter(
    folder: Path, tensors: Mapping[str, Tensor], settings: LoraSettings, base: Path, *, inputs_first: bool = False
) -> None:
    """Write the adapters as a folder that peft, and vLLM beside the base model, can load."""
    targets = sorted({name.split(".lora_")[0].rpartition(".")[2] for name in tensors})
    config = _peft_config(settings, targets)
    config.base_model_name_or_path, config.inference_mode = str(base), True
    config.fan_in_fan_out = inputs_first
    config.save_pretrained(str(folder))
    save_file(dict(tensors), folder / "adapter_model.safetensors")


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Disable the adapters within the block."""
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def merged(name: str, tensor: Tensor, model: nn.Module) -> tuple[str, Tensor] | None:
    """Merge the adapter into a weight, W + (alpha / r) B A; returns None for an adapter's own tensor.

    `name` and the whole `tensor` are an item of the model's state; the result has the name without adapters.
    """
    if ".lora_" in name:
        return None
    if not name.endswith(f"{_BASE}.weight"):
        return name.replace(f"{_BASE}.", "."), tensor
    layer: Any = model.get_submodule(name.removesuffix(f"{_BASE}.weight"))
    plain = name.replace(f"{_BASE}.", ".")
    return plain, tensor + delta(layer).to(tensor.dtype)


def delta(layer: Any) -> Tensor:
    """Compute what a layer's adapter adds to its weight. Collective if sharded.

    The weight of a Conv1D (GPT-2) has the inputs first, that of a linear layer the outputs.
    """
    down, up = (whole(getattr(layer, part)[ADAPTER].weight.detach()) for part in ("lora_A", "lora_B"))
    added: Tensor = layer.scaling[ADAPTER] * (up @ down)
    return added.T if isinstance(layer.get_base_layer(), Conv1D) else added
