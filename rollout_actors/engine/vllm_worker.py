"""What runs inside vLLM's worker processes: loading a whole version of the weights in place.

vLLM imports this module there by name (`worker_extension_cls`) and adds the class's methods to its worker. Knows
neither versions nor proofs: `vllm_engine` calls it between two steps, `swap_proof` judges what came of it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from safetensors import safe_open
from vllm.config import set_current_vllm_config
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

# vLLM warns at every load of each layer that has no tensors of its own; what a load left out, the proof finds.
logging.getLogger("vllm.model_executor.model_loader.reload.layerwise").setLevel(logging.ERROR)


class WeightLoading:
    """Methods that every vLLM worker gains; called through `collective_rpc`, with no request under way."""

    vllm_config: Any
    model_runner: Any

    def load_tensors(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Load a whole version in checkpoint form; for an engine in the caller's own process."""
        self._load_in_place(tensors.items())

    def load_file(self, path: str) -> None:
        """Load a whole version from a safetensors file that every worker of the engine can read."""
        self._load_in_place(_file_tensors(path))

    def _load_in_place(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Replace all weights, repacking what the backend packs.

        Layers are put back into checkpoint form, filled and packed again. A layer that shares its parameter with an
        earlier one (a tied output head) receives no tensor of its own, so what was packed from it is packed again.
        """
        model = self.model_runner.get_model()
        tied = layers_with_a_shared_parameter(model)
        with torch.no_grad(), set_current_vllm_config(self.vllm_config):
            initialize_layerwise_reload(model)
            model.load_weights(tensors)
            finalize_layerwise_reload(model, self.vllm_config.model_config)
            for layer in tied:
                layer.quant_method.process_weights_after_loading(layer)


def layers_with_a_shared_parameter(model: torch.nn.Module) -> list[Any]:
    """Layers holding a parameter that an earlier layer holds too, and that are packed by a `quant_method`."""
    seen: set[int] = set()
    shared = []
    for layer in model.modules():
        own = {id(parameter) for parameter in layer._parameters.values() if parameter is not None}
        if own & seen and hasattr(layer, "quant_method"):
            shared.append(layer)
        seen |= own
    return shared


def _file_tensors(path: str) -> Iterator[tuple[str, torch.Tensor]]:
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118  not a mapping
            yield name, file.get_tensor(name)
