"""What a published version is, and the store that hands out the newest one.

Actors pull: publication leaves a manifest here and the store wakes whoever waits for it. The manifest carries
references and proofs, never tensors. Knows no carrier: `weights_object_store` moves the bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Probe = Sequence[Sequence[float]]
"""Log-probabilities of the probe prompts' tokens given their prefix: one list a prompt, its first token left out."""


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a version in checkpoint form; `reference` is the carrier's, `checksum` is over its bytes."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    checksum: str
    reference: Any


@dataclass(frozen=True, slots=True)
class Manifest:
    """A published version: what it consists of and what an engine that holds it must compute.

    `probe_token_ids` are whole token sequences; `probe` are this version's log-probabilities on them and
    `previous_probe` those of the version before (None for the first).
    """

    version: int
    incarnation: str
    tensors: tuple[TensorEntry, ...]
    probe_token_ids: tuple[tuple[int, ...], ...]
    probe: Probe
    previous_probe: Probe | None

    def checksums(self) -> dict[str, str]:
        """Each tensor's checksum by its name: what a version is, wherever its bytes lie."""
        return {entry.name: entry.checksum for entry in self.tensors}

    def changed_tensors(self, others: Mapping[str, str]) -> list[str]:
        """The tensors that this version and one with those checksums do not have in common, by their names."""
        own = self.checksums()
        return [name for name in sorted({*own, *others}) if own.get(name) != others.get(name)]
