"""A weight carrier that moves nothing, for ranks that are tested without Ray."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from cluster.weights.manifest import Manifest


class NoCarrier:
    def put(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> tuple[Any, ...]:
        return tuple(tensors)

    def fetch(self, manifest: Manifest, *, timeout_s: float) -> dict[str, torch.Tensor]:
        return {}
