"""Prepares this process for hosts with unusual environments, before Ray and vLLM are imported.

Covers proxies for HTTP, a home folder that cannot be written, and folders for temporary files that others cannot use.
"""

from __future__ import annotations

import os
import secrets
import stat
import tempfile
from pathlib import Path

from cluster.errors import InputError

PROXIES = ("http_proxy", "https_proxy", "all_proxy")
LOOPBACK = ("localhost", "127.0.0.1", "::1")
TOKEN_PATH = "RAY_AUTH_TOKEN_PATH"
MAX_SOCKET_BYTES = 107
"""The longest path of a Unix socket on Linux."""
SESSION_BYTES = len("/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store")
IPC_BYTES = len("/00000000-0000-0000-0000-000000000000")


def prepare_host() -> None:
    """Set the environment variables that this host needs, unless the user has. Child processes inherit them."""
    _bypass_proxies()
    _replace_temporary()
    _replace_home()
    temporary = os.fsencode(tempfile.gettempdir())
    if len(temporary) + IPC_BYTES > MAX_SOCKET_BYTES:
        os.environ.setdefault("VLLM_RPC_BASE_PATH", "/tmp")


def _bypass_proxies() -> None:
    """Have HTTP clients reach this machine directly, also those of the user's functions."""
    names = [name for base in PROXIES for name in (base, base.upper())]
    if not any(os.environ.get(name) for name in names):
        return
    for name in ("no_proxy", "NO_PROXY"):
        hosts = [host for host in os.environ.get(name, os.environ.get("no_proxy", "")).split(",") if host]
        os.environ[name] = ",".join([*hosts, *(host for host in LOOPBACK if host not in hosts)])


def _replace_temporary() -> None:
    """Replace a folder for temporary files whose name has a space: torch's compiler passes it on unquoted.

    Raises InputError if /tmp cannot be written either.
    """
    folder = tempfile.gettempdir()
    if not any(character.isspace() for character in folder):
        return
    if not os.access("/tmp", os.W_OK):
        raise InputError("TMPDIR", f"{folder!r} has a space, which compilers cannot read: set another folder")
    os.environ["TMPDIR"] = "/tmp"
    tempfile.tempdir = None


def _replace_home() -> None:
    """If the home folder cannot be written, keep Ray's token and vLLM's settings in a private temporary folder."""
    if _is_writable(Path("~/.ray").expanduser()):
        return
    folder = private_folder()
    os.environ.setdefault("VLLM_CONFIG_ROOT", str(folder / "vllm"))
    os.environ.setdefault("VLLM_CACHE_ROOT", str(folder / "vllm"))
    os.environ.setdefault("TRITON_CACHE_DIR", str(folder / "triton"))
    if any(os.environ.get(name) for name in (TOKEN_PATH, "RAY_AUTH_TOKEN", "RAY_AUTH_MODE")):
        return
    if Path("~/.ray/auth_token").expanduser().is_file():
        return
    token = folder / "ray_auth_token"
    if not token.exists():
        descriptor = os.open(token, os.O_WRONLY | os.O_CREAT, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_hex(32))
    os.environ[TOKEN_PATH] = str(token)


def _is_writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)


def private_folder() -> Path:
    """Return this user's folder for temporary files. Raises InputError if another user could read or replace it."""
    folder = Path(tempfile.gettempdir()) / f"antiphon-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError as error:
        raise InputError("HOME", f"cannot be written, nor can {folder} ({error.strerror}): set HOME") from error
    if found.st_uid != os.getuid() or not stat.S_ISDIR(found.st_mode) or found.st_mode & 0o077:
        raise InputError("HOME", f"cannot be written, and {folder} is not a private folder: set HOME")
    return folder


def ray_folder() -> str | None:
    """Return the folder in which a Ray of ours keeps its sockets, or None for Ray's default.

    Raises InputError if the default is too long for a socket, and /tmp cannot be written.
    """
    variable = "RAY_TMPDIR" if "RAY_TMPDIR" in os.environ else "TMPDIR"
    default = os.environ.get(variable)
    if default is None or len(os.fsencode(f"{default}/ray")) + SESSION_BYTES <= MAX_SOCKET_BYTES:
        return None
    if not os.access("/tmp", os.W_OK):
        what = f"{default!r} is too long for the sockets of Ray, and /tmp cannot be written: set RAY_TMPDIR"
        raise InputError(variable, what)
    return "/tmp/ray"
