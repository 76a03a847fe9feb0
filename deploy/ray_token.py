"""Which token a process shows to the Ray it joins. Ray reads the setting when it is imported, so this does not."""

from __future__ import annotations

import os
from pathlib import Path


def use_own_token() -> None:
    """Show this user's Ray token, if there is one, unless RAY_AUTH_MODE says otherwise.

    A Ray that `train` starts asks for a token by default, but a process that joins one shows none by default.
    """
    stored = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", "~/.ray/auth_token")).expanduser()
    if "RAY_AUTH_TOKEN" in os.environ or stored.exists():
        os.environ.setdefault("RAY_AUTH_MODE", "token")
