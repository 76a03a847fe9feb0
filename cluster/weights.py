"""What a published version is, and the store that hands out the newest one.

Actors pull: publication leaves a manifest here and the store wakes whoever waits for it. The manifest carries
references and proofs, never tensors. Knows no carrier: `weights_object_store` moves the bytes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.errors import WeightsRefused

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

    def differing(self, others: Mapping[str, str]) -> list[str]:
        """The tensors that this version and one with those checksums do not have in common, by their names."""
        own = self.checksums()
        return [name for name in sorted({*own, *others}) if own.get(name) != others.get(name)]


class WeightStore:
    """Holds the newest manifest; versions only rise within an incarnation of the learner.

    A version may be published again with the same tensors: their bytes lie elsewhere then, which wakes nobody.
    """

    def __init__(self) -> None:
        self._latest: Manifest | None = None
        self._published = asyncio.Condition()

    async def publish(self, manifest: Manifest) -> None:
        """Make `manifest` the newest. Raises WeightsRefused when its version does not rise."""
        async with self._published:
            latest = self._latest
            if latest and not _follows(manifest, latest):
                raise WeightsRefused(f"version {manifest.version}", f"version {latest.version} is already published")
            self._latest = manifest
            self._published.notify_all()

    async def latest(self) -> Manifest | None:
        """The newest manifest, or None before the first publication."""
        return self._latest

    async def wait_other(self, key: tuple[str, int] | None, *, timeout_s: float) -> Manifest | None:
        """Wait until the newest manifest is another than `key` (incarnation, version); woken by `publish`.

        Returns None when the deadline passes first: nothing was published, which is no error.
        """

        def other() -> bool:
            latest = self._latest
            return latest is not None and (latest.incarnation, latest.version) != key

        async with self._published:
            try:
                await asyncio.wait_for(self._published.wait_for(other), timeout_s)
            except TimeoutError:
                return None
            return self._latest


def _follows(manifest: Manifest, latest: Manifest) -> bool:
    if manifest.incarnation != latest.incarnation or manifest.version > latest.version:
        return True
    return manifest.version == latest.version and manifest.checksums() == latest.checksums()
