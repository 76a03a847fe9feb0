"""Checks that the reward service may and can listen at its address. Does not import Ray."""

from __future__ import annotations

import errno
import ipaddress
import socket

from cluster.errors import InputError
from reward_service.config.service import RewardServiceConfig
from reward_service.http.tokens import token_book


def check_address(config: RewardServiceConfig, token: str | None) -> None:
    """Raise InputError if the port is taken, or a host that others can reach has no token."""
    if config.port is None:
        return
    require_token(config, token)
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((config.host, config.port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise InputError("reward_service.port", f"{config.port} is taken on {config.host}") from error
            raise InputError("reward_service.host", f"cannot bind {config.host}:{config.port}: {error}") from error


def require_token(config: RewardServiceConfig, token: str | None, where: str = "reward_service.host") -> None:
    """Raise InputError at `where` if other machines can reach the host and no token is required."""
    if not is_loopback(config.host) and not token_book(config, token).is_required:
        what = f"{config.host} can be reached from other machines: set ANTIPHON_TOKEN, or antiphon token RUN --add NAME"
        raise InputError(where, what)


def is_loopback(host: str) -> bool:
    """Return whether `host` is a loopback address or localhost."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"
