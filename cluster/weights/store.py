"""Announce published versions to actors that wait for them."""

from __future__ import annotations

import asyncio

from cluster.errors import WeightsRefused
from cluster.weights.manifest import Manifest


class WeightStore:
    """Holds the newest manifest. Versions only rise within an incarnation of the learner group.

    A version may be published again with the same tensors at another place; that wakes no waiting call.
    """

    def __init__(self) -> None:
        self._latest: Manifest | None = None
        self._published = asyncio.Condition()

    async def publish(self, manifest: Manifest) -> None:
        """Make `manifest` the newest; wakes `wait_other`. Raises WeightsRefused if its version is not newer."""
        async with self._published:
            latest = self._latest
            if latest and not _follows(manifest, latest):
                raise WeightsRefused(f"version {manifest.version}", f"version {latest.version} is already published")
            self._latest = manifest
            self._published.notify_all()

    async def latest(self) -> Manifest | None:
        """Return the newest manifest, or None before the first publication."""
        return self._latest

    async def wait_other(self, key: tuple[str, int] | None, *, timeout_s: float) -> Manifest | None:
        """Wait until the newest manifest is not `key` (incarnation, version) and return it; woken by `publish`.

        Returns None if nothing was published within `timeout_s`; that is no error.
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
