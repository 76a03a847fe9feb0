"""Connects to a running Ray: the token to show and whether an address answers. Must not import Ray, which reads the
token settings when it is imported."""

from __future__ import annotations

import os
import socket
from pathlib import Path


def use_own_token() -> None:
    """Use this user's Ray token, if there is one, unless RAY_AUTH_MODE is set.

    A Ray that `train` starts requires a token by default, but a process that joins one sends none by default.
    """
    stored = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", "~/.ray/auth_token")).expanduser()
    if "RAY_AUTH_TOKEN" in os.environ or stored.exists():
        os.environ.setdefault("RAY_AUTH_MODE", "token")


CONNECT_TIMEOUT_S = 10.0


def answers(ray_address: str) -> bool:
    """Return whether anything listens at host:port; `ray.init` would retry a dead address for minutes."""
    host, _, port = ray_address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT_S).close()
    except (OSError, ValueError):
        return False
    return True
