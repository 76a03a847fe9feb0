"""A small server with the routes of the Hugging Face Hub that its libraries use to list and download files."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants

from cluster.hub import download

_API = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/([^/]+)(?:/(.*))?)?")
_RESOLVE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


@dataclass
class Repository:
    """The commits of a repository, each with its files by name, and its branches."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    gated: bool = False

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        """Add a commit to a branch; return its hash."""
        digest = hashlib.sha1(repr((len(self.commits), sorted(files.items()))).encode()).hexdigest()
        self.commits[digest] = files
        self.refs[branch] = digest
        return digest


@dataclass
class Hub:
    """Repositories by kind and name (``models/me/tiny``), and the requests that were made."""

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)

    def add(self, kind: str, name: str, files: dict[str, bytes], *, gated: bool = False) -> str:
        """Add a repository, or a commit to it; return the commit's hash."""
        repository = self.repositories.setdefault(f"{kind}/{name}", Repository(gated=gated))
        return repository.commit(files)


def _tree(files: dict[str, bytes], folder: str, *, recursive: bool) -> list[dict[str, object]]:
    """Return the files and folders below `folder`, or only those directly in it."""
    entries: dict[str, dict[str, object]] = {}
    for path, data in sorted(files.items()):
        if not path.startswith(folder):
            continue
        parents = [path[: found.start()] for found in re.finditer("/", path) if found.start() > len(folder)]
        for parent in parents:
            entries[parent] = {"type": "directory", "path": parent, "size": 0, "oid": "0" * 40}
        entries[path] = {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
    return [entry for path, entry in entries.items() if recursive or "/" not in path[len(folder) :]]


@contextmanager
def serve_hub() -> Iterator[Hub]:
    """Serve an empty hub on a port of its own."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            return None

        def do_GET(self) -> None:
            hub.requests.append(f"{self.command} {self.path}")
            path = unquote(urlsplit(self.path).path)
            if found := _API.fullmatch(path):
                self._api(found)
            elif found := _RESOLVE.fullmatch(path):
                self._file(found)
            else:
                self._answer(404, {"error": "no such route"})

        do_HEAD = do_POST = do_GET

        def _api(self, found: re.Match[str]) -> None:
            kind, name, route, revision, folder = found.groups()
            located = self._commit(kind, name, revision or "main")
            if located is None:
                return
            commit, files = located
            if route == "tree":
                recursive = "recursive=true" in self.path.lower()
                self._answer(200, _tree(files, f"{folder}/" if folder else "", recursive=recursive))
            elif route == "paths-info":
                body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
                wanted = json.loads(body)["paths"] if body.startswith("{") else re.findall(r"paths=([^&]*)", body)
                known = {str(entry["path"]): entry for entry in _tree(files, "", recursive=True)}
                self._answer(200, [known[path] for path in map(unquote, wanted) if path in known])
            else:
                siblings = [{"rfilename": path} for path in sorted(files)]
                self._answer(200, {"id": name, "sha": commit, "siblings": siblings, "private": False, "tags": []})

        def _file(self, found: re.Match[str]) -> None:
            dataset, name, revision, path = found.groups()
            kind = "datasets" if dataset else "models"
            located = self._commit(kind, name, revision)
            if located is None:
                return
            commit, files = located
            if hub.repositories[f"{kind}/{name}"].gated and "Authorization" not in self.headers:
                self._answer(401, {"error": "gated"}, code="GatedRepo")
            elif path not in files:
                self._answer(404, {"error": "no such file"}, code="EntryNotFound", commit=commit)
            else:
                self._send(200, files[path], commit, etag=hashlib.sha1(files[path]).hexdigest())

        def _commit(self, kind: str, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
            repository = hub.repositories.get(f"{kind}/{name}")
            if repository is None:
                self._answer(401, {"error": "Repository not found"}, code="RepoNotFound")
                return None
            commit = repository.refs.get(revision, revision)
            if commit not in repository.commits:
                self._answer(404, {"error": "no such revision"}, code="RevisionNotFound")
                return None
            return commit, repository.commits[commit]

        def _answer(self, status: int, body: object, *, code: str | None = None, commit: str | None = None) -> None:
            self._send(status, json.dumps(body).encode(), commit, code=code)

        def _send(
            self, status: int, body: bytes, commit: str | None, *, etag: str | None = None, code: str | None = None
        ) -> None:
            self.send_response(status)
            headers = {"Content-Length": str(len(body)), "ETag": etag and f'"{etag}"', "X-Repo-Commit": commit}
            headers |= {"X-Error-Code": code}
            for name, value in headers.items():
                if value:
                    self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def connect(hub: Hub, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Let the Hub's libraries of this process ask `hub` and keep their cache in `folder`."""
    import datasets

    for module, name, value in (
        (constants, "HF_HUB_OFFLINE", False),
        (datasets.config, "HF_HUB_OFFLINE", False),
        (constants, "ENDPOINT", hub.url),
        (constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"),
        (constants, "HF_HOME", str(folder / "hf")),
        (constants, "HF_HUB_CACHE", str(folder / "hf" / "hub")),
        (datasets.config, "HF_ENDPOINT", hub.url),
        (datasets.config, "HUB_DATASETS_URL", hub.url + "/datasets/{repo_id}/resolve/{revision}/{path}"),
        (datasets.config, "HF_CACHE_HOME", folder / "hf"),
        (datasets.config, "HF_DATASETS_CACHE", folder / "hf" / "datasets"),
    ):
        monkeypatch.setattr(module, name, value)
    forget()


def go_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the Hub's libraries of this process make no requests."""
    import datasets

    forget()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def forget() -> None:
    """Forget what this process has downloaded, as a new process does."""
    from huggingface_hub import HfFileSystem

    for function in (download.commit_of, download._model_folder, download._data_folder, download._files):
        function.cache_clear()
    HfFileSystem.clear_instance_cache()
