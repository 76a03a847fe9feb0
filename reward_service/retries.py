"""What an HTTP answer says about a retry."""

from __future__ import annotations

import math
from collections.abc import Mapping


def retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Return the seconds of the Retry-After header, or None if it holds a date or is missing."""
    try:
        seconds = float(headers.get("retry-after", ""))
    except ValueError:
        return None
    return seconds if 0 <= seconds < math.inf else None
