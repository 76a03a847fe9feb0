"""Describe a published version: its tensors by reference and checksum, and what an engine that holds it computes.

A manifest contains no tensors: `cluster.weights.transport` moves them. Imports neither torch nor ray.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Probe = Sequence[Sequence[float]]
"""Log-probabilities of the probe prompts' tokens given their prefix: one list per prompt, without its first token."""
OBJECT_STORE = "object_store"
"""Name of the carrier through Ray's object store."""


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a version in checkpoint form.

    `checksum` is over its bytes. `reference` locates them; only its carrier reads it.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    checksum: str
    reference: Any


@dataclass(frozen=True, slots=True)
class Manifest:
    """A published version: its tensors, the carrier that fetches them, and what an engine that holds it must compute.

    `incarnation` names the learner group that published it. `probe_token_ids` are whole token sequences; `probe` are
    this version's log-probabilities on them and `previous_probe` those of the version before (None for the first).
    """

    version: int
    incarnation: str
    tensors: tuple[TensorEntry, ...]
    probe_token_ids: tuple[tuple[int, ...], ...]
    probe: Probe
    previous_probe: Probe | None
    carrier: str = OBJECT_STORE

    def checksums(self) -> dict[str, str]:
        """Return each tensor's checksum by its name; two manifests with equal checksums hold the same weights."""
        return {entry.name: entry.checksum for entry in self.tensors}

    def changed_tensors(self, others: Mapping[str, str]) -> list[str]:
        """Return the names, sorted, of tensors that differ from `others` (checksums by name) or that only one has."""
        own = self.checksums()
        return [name for name in sorted({*own, *others}) if own.get(name) != others.get(name)]
