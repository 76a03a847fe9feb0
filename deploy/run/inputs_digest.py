"""Record digests of a run's inputs in RUN/inputs.json, and find inputs whose contents changed since.

A file's digest is its sha256, as `sha256sum` prints it; an input of several files has that of the list of their names
and digests. A file of more than 1 MiB is read again only if its size, modification time or inode differs from the
recorded ones, so that large models cost nothing when a run resumes; smaller files are always read.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from cluster.errors import InputError
from cluster.files import read_json, write_json
from deploy.config.schema import RunConfig
from deploy.run.directory import RunDirectory
from deploy.run.input_files import RunInput, run_inputs
from deploy.run.layout import INPUTS

ALWAYS_READ_BYTES = 2**20
RECENT_NS = 2 * 10**9
"""A file changed this recently may change again without another modification time, so its state is not trusted."""
NUM_THREADS = 4
SHOWN_DIGITS = 12
MAX_SHOWN_FILES = 3
Entry = dict[str, Any]
"""An input in inputs.json: name, digest, its files by name (digest, state), and earlier digests."""


class FileState(NamedTuple):
    """What shows, without reading a file, that it is probably unchanged."""

    size: int
    mtime_ns: int
    inode: int


@dataclass(frozen=True, slots=True)
class ChangedInput:
    """An input whose contents differ from the recorded ones; `files` are those that differ, with what happened."""

    input: RunInput
    before: str
    now: str
    files: Sequence[str]

    def __str__(self) -> str:
        digests = f"sha256 was {self.before[:SHOWN_DIGITS]}, is {self.now[:SHOWN_DIGITS]}"
        if len(self.input.files) == 1 and not self.input.is_code:
            return f"{self.input.key} ({self.input.name}: {digests})"
        more = len(self.files) - MAX_SHOWN_FILES
        shown = ", ".join([*self.files[:MAX_SHOWN_FILES], *([f"{more} more"] if more > 0 else [])])
        return f"{self.input.key} ({self.input.name}: {shown}; {digests})"


class InputDigests:
    """The digests of a run's inputs now, beside those in `run_path`."""

    def __init__(self, config: RunConfig, run_path: Path) -> None:
        self._inputs = run_inputs(config, run_path)
        self._recorded: Mapping[str, Entry] = _recorded(run_path)
        self._entries = {each.key: _entry(each, self._recorded.get(each.key, {})) for each in self._inputs}

    def changed(self) -> list[ChangedInput]:
        """Return the inputs of the same name whose contents differ from the recorded ones."""
        found = []
        for each in self._inputs:
            before, now = self._recorded.get(each.key), self._entries[each.key]
            if before is not None and before["name"] == now["name"] and before["digest"] != now["digest"]:
                files = _differences(before["files"], now["files"])
                found.append(ChangedInput(each, before["digest"], now["digest"], files))
        return found

    def record(self, run: RunDirectory, *, step: int) -> None:
        """Write inputs.json; digests that changed are kept as earlier ones, which held up to `step`."""
        entries = dict(self._recorded)
        for key, entry in self._entries.items():
            before = self._recorded.get(key, {})
            earlier = list(before.get("earlier", []))
            if before and (before["name"], before["digest"]) != (entry["name"], entry["digest"]):
                earlier.append({"name": before["name"], "digest": before["digest"], "until_step": step})
            entries[key] = entry | ({"earlier": earlier} if earlier else {})
        if entries != self._recorded:
            write_json(run.path / INPUTS, entries)


def refused(changed: Sequence[ChangedInput], *, allow_recorded: bool) -> str | None:
    """Return why a run refuses these changes, and what to do; None if it accepts them."""
    never = [str(each) for each in changed if each.input.may_change == "never"]
    recorded = [str(each) for each in changed if each.input.may_change == "recorded"]
    if not never and (allow_recorded or not recorded):
        return None
    parts = [f"{', '.join(never)} may not change within a run"] if never else []
    parts += [f"{', '.join(recorded)} may change with --allow-changes"] if recorded else []
    if never:
        advice = "restore what was there, or give the run another --name"
    else:
        advice = "restore what was there, or add --allow-changes, which uses the new content from the next step on"
    return (
        f"contents of the run's inputs have changed: {'; '.join(parts)}. To continue: {advice} "
        "(--fresh deletes this run and starts over)"
    )


def _recorded(run_path: Path) -> dict[str, Any]:
    path = run_path / INPUTS
    return read_json(path) if path.is_file() else {}


def _entry(each: RunInput, recorded: Entry) -> Entry:
    """Return an input's entry; reads only the files that may have changed since `recorded`."""
    known = recorded.get("files", {}) if recorded.get("name") == each.name else {}
    with ThreadPoolExecutor(NUM_THREADS) as threads:
        digested = threads.map(lambda name: _file_entry(each.files[name], known.get(name, {})), each.files)
        files = dict(zip(each.files, digested, strict=True))
    (only, *others) = files.values()
    listed = json.dumps({name: entry["digest"] for name, entry in sorted(files.items())})
    digest = hashlib.sha256(listed.encode()).hexdigest() if others else only["digest"]
    return {"name": each.name, "digest": digest, "files": files}


def _file_entry(path: Path, known: Entry) -> Entry:
    try:
        stat = path.stat()
        state = FileState(stat.st_size, stat.st_mtime_ns, stat.st_ino)
        if state.size > ALWAYS_READ_BYTES and known.get("state") == list(state):
            return known
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(str(path), f"cannot be read ({error.strerror})") from error
    is_settled = time.time_ns() - state.mtime_ns > RECENT_NS
    return {"digest": digest, "state": list(state) if is_settled else None}


def _differences(before: Mapping[str, Entry], now: Mapping[str, Entry]) -> list[str]:
    """Return the files that differ, each with what happened to it."""
    gone = [f"{name} is gone" for name in before if name not in now]
    new = [f"{name} is new" for name in now if name not in before]
    other = [f"{name} changed" for name in now if name in before and before[name]["digest"] != now[name]["digest"]]
    return [*other, *gone, *new]
