"""The protocol of a scorer."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from cluster.scoring import Outcome, ScoreRequest


class Scorer(Protocol):
    """Judges responses one by one: the same request and version always get the same reward."""

    name: str
    version: str

    async def score(self, requests: Sequence[ScoreRequest]) -> list[Outcome]:
        """One outcome a request, in their order; what could not be scored is a RewardError naming its id."""


async def close(scorer: Scorer) -> None:
    """Let go of the threads, processes and connections that a scorer holds, where it holds any."""
    if hasattr(scorer, "aclose"):
        await scorer.aclose()
    elif hasattr(scorer, "close"):
        scorer.close()


def digest_of(*contents: str | Path) -> str:
    """The first 12 hexadecimal digits of sha256 over texts and files' bytes, in the given order."""
    digest = hashlib.sha256()
    for content in contents:
        digest.update(hashlib.sha256(content.read_bytes() if isinstance(content, Path) else content.encode()).digest())
    return digest.hexdigest()[:12]
