"""Named access tokens of the HTTP server, stored as digests and compared in constant time.

A token is accepted as a bearer token, or as the password of HTTP Basic for clients that are configured by a URL only.
"""

from __future__ import annotations

import base64
import binascii
import fcntl
import hashlib
import hmac
import json
import logging
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from cluster.errors import InputError
from cluster.files import write_json
from reward_service.config.service import RewardServiceConfig

LOGGER = logging.getLogger("antiphon")
DIGEST = re.compile(r"[0-9a-f]{64}")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
FILE = "tokens.json"
"""The file of a run's tokens, in the run directory."""
OWN = "ANTIPHON_TOKEN"
"""The name of the token from the environment."""


class TokenBook:
    """The valid tokens: that of the environment, and those of a file, reloaded when it changes.

    Whether a token is required is decided at the start: after the last one is revoked, every call is rejected.
    Raises InputError for an invalid file.
    """

    def __init__(self, token: str | None, path: Path | None = None, *, is_required: bool = False) -> None:
        self._own = {OWN: _digest(token.encode())} if token else {}
        self._path = path
        self._stamp = _stamp(path)
        self._named = read_tokens(path) if path else {}
        self.is_required = bool(is_required or self._own or self._named)

    def name_of(self, authorization: bytes) -> str | None:
        """Return the name of the token in an Authorization header, or None if it has no valid token."""
        received = _digest(_token_in(authorization))
        found = None
        for name, digest in (self._own | self._current()).items():
            if hmac.compare_digest(digest, received):
                found = name
        return found

    def _current(self) -> dict[str, str]:
        stamp = _stamp(self._path)
        if self._path is None or (stamp is not None and stamp == self._stamp):
            return self._named
        try:
            self._named, self._stamp = read_tokens(self._path), stamp
        except InputError as error:
            LOGGER.error("%s; its tokens are rejected until it can be read", error)
            self._named, self._stamp = {}, None
        return self._named


def with_tokens(config: RewardServiceConfig, run_path: Path) -> RewardServiceConfig:
    """Return the settings with the absolute path of their token file, by default the run's own.

    If the settings name a file, a token is required even if the file has none yet.
    """
    http = config.http
    path, is_required = http.tokens or run_path / FILE, http.require_token or http.tokens is not None
    http = http.model_copy(update={"tokens": path.absolute(), "require_token": is_required})
    return config.model_copy(update={"http": http})


def token_book(config: RewardServiceConfig, token: str | None) -> TokenBook:
    """Return the tokens of these settings. Raises InputError for an invalid file."""
    return TokenBook(token, config.http.tokens, is_required=config.http.require_token)


def read_tokens(path: Path) -> dict[str, str]:
    """Return SHA-256 digests of the tokens by name; none if there is no file.

    Raises InputError for an invalid file.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["tokens"]
        if not all(DIGEST.fullmatch(digest) for digest in found.values()):
            raise ValueError("a digest is not 64 hexadecimal digits")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(str(path), f"not a token file: {type(error).__name__}: {error}") from error
    return dict(found)


def add_token(path: Path, name: str) -> str:
    """Create a token and store its digest; returns the token, which can't be read again later.

    Raises InputError for a name that is taken or invalid.
    """
    if not NAME.fullmatch(name) or name == OWN:
        raise InputError("token", f"{name!r} is not a valid token name: use letters, digits, . _ -")
    token = secrets.token_urlsafe(32)
    with _locked(path):
        tokens = read_tokens(path)
        if name in tokens:
            raise InputError("token", f"there is a token {name!r} already: revoke it first")
        _write(path, tokens | {name: _digest(token.encode())})
    return token


def revoke_token(path: Path, name: str) -> None:
    """Delete a token: calls with it are rejected from now on.

    Raises InputError if no token has that name.
    """
    with _locked(path):
        tokens = read_tokens(path)
        if name not in tokens:
            raise InputError("token", f"no token {name!r} in {path}")
        del tokens[name]
        _write(path, tokens)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock that every process takes to change the file."""
    descriptor = os.open(path.with_name(f".{path.name}.lock"), os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _write(path: Path, tokens: Mapping[str, str]) -> None:
    write_json(path, {"tokens": dict(sorted(tokens.items()))}, mode=0o600)


def _token_in(authorization: bytes) -> bytes:
    scheme, _, credentials = authorization.partition(b" ")
    credentials = credentials.strip()
    if scheme.lower() == b"bearer":
        return credentials
    if scheme.lower() != b"basic":
        return b""
    try:
        return base64.b64decode(credentials, validate=True).partition(b":")[2]
    except (binascii.Error, ValueError):
        return b""


def _digest(token: bytes) -> str:
    return hashlib.sha256(token).hexdigest()


def _stamp(path: Path | None) -> tuple[int, int, int] | None:
    try:
        status = os.stat(path) if path else None
    except OSError:
        return None
    return (status.st_mtime_ns, status.st_size, status.st_ino) if status else None
