"""Write files and folders whole or not at all; digest files."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path


def digest_files(paths: Sequence[Path]) -> str:
    """The first 12 hexadecimal digits of sha256 over the files' bytes, in the given order."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()[:12]
