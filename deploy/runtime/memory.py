"""Measures the peak memory of a run: proportional set size (PSS) of this process and its descendants, Ray included."""

from __future__ import annotations

import asyncio
from pathlib import Path

import psutil

EVERY_S = 2.0


class PeakMemory:
    """Samples the memory every two seconds while `follow` runs."""

    def __init__(self) -> None:
        self.size_bytes = 0

    async def follow(self) -> None:
        """Sample until cancelled."""
        while True:
            size_bytes = await asyncio.to_thread(total_pss_bytes)
            self.size_bytes = max(self.size_bytes, size_bytes)
            await asyncio.sleep(EVERY_S)


def total_pss_bytes() -> int:
    """Return the current PSS of this process and its descendants; a process that ends meanwhile counts 0."""
    me = psutil.Process()
    return sum(_pss_bytes(process.pid) for process in (me, *me.children(recursive=True)))


def _pss_bytes(pid: int) -> int:
    try:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return 0
    lines = (line.split() for line in rollup.splitlines())
    return sum(int(fields[1]) * 1024 for fields in lines if fields[0] == "Pss:")
