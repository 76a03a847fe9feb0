"""How the tensors of a version travel from the learner to the rollout actors: the protocol and its implementations.

The learner's carrier puts the tensors and returns their entries; the manifest names the carrier, and each actor
fetches with the carrier of the same name. To add one, write a class with `put` and `fetch` and register its path here;
`learner.weight_carrier` also takes the dotted path of a user's own class. Imports neither torch nor ray.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from typing import TYPE_CHECKING, Protocol

from cluster.registry import Registry
from cluster.weights.manifest import OBJECT_STORE, Manifest, TensorEntry

if TYPE_CHECKING:
    import torch

KEY = "learner.weight_carrier"
"""The setting that names the carrier."""


class Carrier(Protocol):
    """Moves the tensors of a version. The same object may put or fetch many versions, one at a time."""

    def put(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> tuple[TensorEntry, ...]:
        """Make named tensors fetchable from any machine of the run and return their entries in the same order.

        An entry's `reference` is what `fetch` needs to find its tensor; it must pickle.
        """

    def fetch(self, manifest: Manifest, *, timeout_s: float) -> dict[str, torch.Tensor]:
        """Return every tensor of a version by name, with its checksum verified. Blocks.

        Raises WeightsRefused naming a tensor whose bytes differ, and WeightsLost if the process that held them is gone:
        its successor publishes them again.
        """


CARRIERS: Registry[Callable[[], Carrier]] = Registry("weight carrier")
CARRIERS.register_path(OBJECT_STORE, "cluster.weights.object_store:ObjectStore")


@cache
def carrier(name: str) -> Carrier:
    """Return this process's carrier of that name or dotted path. Raises InputError if there is none."""
    return CARRIERS.find(name, key=KEY)()
