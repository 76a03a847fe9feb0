"""Write the journal: the recorder is the only writer of a run's log and orders its events.

A plain class with async methods that runs as an async Ray actor. Ray restarts it if its process dies, and it resumes
from its own log. Calls may be repeated: events that are already recorded change nothing. Records that wait together are
written with one sync of the disk, off the event loop.
"""

from __future__ import annotations

import asyncio
import fcntl
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pyarrow as pa

from cluster.errors import AntiphonError, RecorderError
from cluster.journal.events import Record, start
from cluster.journal.files import ROWS_AT_ONCE, LogFile, compact, next_path, open_streams, read_files
from cluster.journal.ordering import COLUMNS, Sequencer

MAX_FILE_BYTES = 64 * 2**20
"""Size at which a file of the log is closed."""
LOCK_WAIT_S = 30.0
"""How long to wait for the recorder of a killed command to exit."""
LOCK_RETRY_S = 0.1


class Recorder:
    """Appends to the log in `folder`. After an error of the disk, every later call raises it."""

    def __init__(self, folder: Path, *, max_file_bytes: int = MAX_FILE_BYTES) -> None:
        self._folder = folder
        self._max_file_bytes = max_file_bytes
        self._sequencer = Sequencer()
        self._num_records = 0
        self._pending: list[Record] = []
        self._file: LogFile | None = None
        self._lock: IO[bytes] | None = None
        self._compacting: asyncio.Task[None] | None = None
        self._writing = asyncio.Lock()
        self._is_open = False
        self._ended_by: AntiphonError | None = None

    async def open(self) -> None:
        """Become the only writer of the log."""
        self._require_open()
        await self._open()

    async def begin(
        self, incarnation: str, *, version: int, group: int, num_steps: int, settings: str | None = None
    ) -> None:
        """Record that the command `incarnation` starts the run or resumes it after `version`.

        Later versions, and groups from `group` on, are repeated.
        """
        await self.record([start(incarnation, version=version, group=group, num_steps=num_steps, settings=settings)])

    async def record(self, records: Sequence[Record]) -> None:
        """Append these records in this order; returns when they are on the disk.

        Raises TrajectoryRefused, having appended none, if one comes from an actor that was declared dead.
        """
        self._require_open()
        await self._open()
        self._sequencer.require_alive(records)
        with self._ended_by_errors():
            self._pending += [self._numbered(record) for record in records if self._sequencer.accept(record)]
        await self._commit()

    async def close(self) -> None:
        """Write pending records and convert the last file to Parquet. Later calls raise RecorderError."""
        await self._open()
        await self._commit()
        self._ended_by = RecorderError(str(self._folder), "the log is closed")
        async with self._writing:
            with self._ended_by_errors():
                await self._close_file()
                await self._compacted()
        assert self._lock is not None
        self._lock.close()

    def _require_open(self) -> None:
        if self._ended_by is not None:
            raise self._ended_by

    def _numbered(self, record: Record) -> Record:
        self._num_records += 1
        return {"number": self._num_records - 1, "time_s": time.time(), **record}

    @contextmanager
    def _ended_by_errors(self) -> Iterator[None]:
        """End the log after a failed write or a record that is out of order."""
        try:
            yield
        except AntiphonError as error:
            self._ended_by = error
            raise
        except (OSError, pa.ArrowException) as error:
            self._ended_by = RecorderError(str(self._folder), f"cannot be written ({error})")
            raise self._ended_by from error

    async def _open(self) -> None:
        """Lock the log and read its state, at the first call, also after a restart."""
        if self._is_open:
            return
        async with self._writing:
            self._require_open()
            if not self._is_open:
                with self._ended_by_errors():
                    self._lock = await self._locked()
                    await asyncio.to_thread(self._take_up)
                self._is_open = True

    async def _locked(self) -> IO[bytes]:
        self._folder.mkdir(parents=True, exist_ok=True)
        lock = (self._folder / ".lock").open("ab")
        give_up_at = time.monotonic() + LOCK_WAIT_S
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                if time.monotonic() > give_up_at:
                    lock.close()
                    raise RecorderError(str(self._folder), "another recorder writes to this log") from error
            else:
                return lock
            await asyncio.sleep(LOCK_RETRY_S)

    def _take_up(self) -> None:
        for table in read_files(self._folder, COLUMNS).values():
            self._num_records += len(table)
            for batch in table.to_batches(max_chunksize=ROWS_AT_ONCE):
                for record in batch.to_pylist():
                    self._sequencer.accept(record)
        for stream in open_streams(self._folder):
            compact(stream)
        self._file = LogFile(next_path(self._folder))

    async def _commit(self) -> None:
        """Return when everything pending is on the disk. The first caller writes for all that wait."""
        async with self._writing:
            records, self._pending = self._pending, []
            self._require_open()
            if records:
                with self._ended_by_errors():
                    await asyncio.to_thread(self._append, records)
                    await self._rotate()

    def _append(self, records: Sequence[Record]) -> None:
        assert self._file is not None
        self._file.append(records)

    async def _rotate(self) -> None:
        """Close a full file, start another, and convert the closed one to Parquet in the background."""
        assert self._file is not None
        if self._file.size_bytes >= self._max_file_bytes:
            await self._close_file()
            self._file = await asyncio.to_thread(LogFile, next_path(self._folder))

    async def _close_file(self) -> None:
        """Close the current file, after the previous one is converted to Parquet."""
        await self._compacted()
        if self._file is not None:
            file, self._file = self._file, None
            await asyncio.to_thread(file.close)
            self._compacting = asyncio.create_task(asyncio.to_thread(compact, file.path))

    async def _compacted(self) -> None:
        compacting, self._compacting = self._compacting, None
        if compacting is not None:
            await compacting
