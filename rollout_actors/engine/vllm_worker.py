"""Loads a version of the weights in place, inside vLLM's worker processes.

vLLM imports this module by its name (`worker_extension_cls`) and adds the methods of the class to its worker.
`vllm_engine` calls them between two steps; `swap_check` checks the result.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from safetensors import safe_open
from vllm.config import set_current_vllm_config
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

# vLLM warns at every load about layers without tensors. The proof would find a tensor that a load left out.
logging.getLogger("vllm.model_executor.model_loader.reload.layerwise").setLevel(logging.ERROR)


class WeightLoading:
    """Methods added to every vLLM worker. Call them by `collective_rpc` while no request is active."""

    vllm_config: Any
    model_runner: Any

    def load_tensors(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Load a version in checkpoint form, if the engine runs in the caller's process."""
        self._load_in_place(tensors.items())

    def load_file(self, path: str) -> None:
        """Load a version from a safetensors file that every worker can read."""
        self._load_in_place(_file_tensors(path))

    def _load_in_place(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Replace all weights, including those that the backend keeps in packed form.

        Converts the layers back to checkpoint form, fills and packs them. A layer that shares its parameter with an
        earlier one (a tied output head) receives no tensor and is packed again from the shared one.
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
    """Return the layers that share a parameter with an earlier layer and are packed by a `quant_method`."""
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
