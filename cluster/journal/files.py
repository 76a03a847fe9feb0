"""Read and write an append-only log: Arrow IPC streams with a checksum per record batch, Parquet once closed.

`records-NNNNNN.arrows` is written batch by batch, each synced before the next, so only the last batch of a file can be
torn. A torn file is read up to its last whole batch and never appended to. A closed file becomes
`records-NNNNNN.parquet`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cluster.errors import RecorderError, first_line
from cluster.files import replacing, sync_folder
from cluster.journal.events import SCHEMA, Record

STREAM, CLOSED = ".arrows", ".parquet"
CHECKSUM = b"blake2b"
VERSION = b"antiphon_records"
PARQUET = {"compression": "zstd", "write_page_checksum": True}
ROWS_A_GROUP = 8_192
"""Records per Parquet row group: more need memory, fewer need space."""
ROWS_AT_ONCE = 65_536
"""Records that readers unpack at a time."""


class LogFile:
    """One file of the log that is being written. Its methods block until the disk has synced."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("xb", buffering=0)
        self._writer = pa.ipc.new_stream(self._file, SCHEMA)
        self._sync()
        sync_folder(path.parent)

    @property
    def size_bytes(self) -> int:
        """Size on the disk."""
        return self._file.tell()

    def append(self, records: Sequence[Record]) -> None:
        """Write one batch; on the disk when this returns."""
        batch = pa.RecordBatch.from_pylist(records, schema=SCHEMA)
        self._writer.write_batch(batch, custom_metadata={CHECKSUM: _checksum(batch)})
        self._sync()

    def close(self) -> None:
        """End the stream and close the file."""
        self._writer.close()
        self._sync()
        self._file.close()

    def _sync(self) -> None:
        os.fsync(self._file.fileno())


def _checksum(batch: pa.RecordBatch) -> bytes:
    """Return the checksum of the batch as written."""
    return hashlib.blake2b(batch.serialize(), digest_size=16).hexdigest().encode()


def next_path(folder: Path) -> Path:
    """Return the path of the next file of the log."""
    last = max((int(name.removeprefix("records-")) for name in _names(folder)), default=-1)
    return folder / f"records-{last + 1:06d}{STREAM}"


def open_streams(folder: Path) -> list[Path]:
    """Return the files that were never closed or not yet converted to Parquet."""
    return sorted(folder.glob(f"records-*{STREAM}"))


def _names(folder: Path) -> list[str]:
    return sorted({path.stem for ending in (STREAM, CLOSED) for path in folder.glob(f"records-*{ending}")})


def compact(stream: Path) -> None:
    """Convert a stream that is no longer written to Parquet, whole or not at all; delete it if it holds no records."""
    if _holds_records(stream):
        with replacing(stream.with_suffix(CLOSED)) as partial:
            _write_parquet(stream, partial)
    stream.unlink()
    pa.default_memory_pool().release_unused()


def _holds_records(stream: Path) -> bool:
    if not stream.stat().st_size:
        return False
    with pa.memory_map(str(stream)) as source:
        return next(whole_batches(source.read_buffer(), stream), None) is not None


def _write_parquet(stream: Path, path: Path) -> None:
    """Write a stream's records as Parquet, a few thousand at a time."""
    waiting = list[pa.RecordBatch]()
    with pa.memory_map(str(stream)) as source, pq.ParquetWriter(path, SCHEMA, **PARQUET) as writer:
        for batch in whole_batches(source.read_buffer(), stream):
            waiting.append(batch)
            if sum(map(len, waiting)) >= ROWS_A_GROUP:
                writer.write_table(_whole_table(waiting, stream))
                waiting = []
        if waiting:
            writer.write_table(_whole_table(waiting, stream))


def _whole_table(batches: Sequence[pa.RecordBatch], where: Path) -> pa.Table:
    """Batches with all columns of SCHEMA, with nulls for those that an older writer lacked."""
    table = _conformed(pa.Table.from_batches(batches), SCHEMA.names, where)
    return table.replace_schema_metadata(SCHEMA.metadata)


def read_log(folder: Path, columns: Sequence[str] = SCHEMA.names) -> pa.Table:
    """Return every record of a log, in order, with these columns; columns that an older writer lacked are null.

    Raises RecorderError naming the file that is damaged, or the records that are missing.
    """
    wanted = list(dict.fromkeys(["number", *columns]))
    schema = pa.schema([SCHEMA.field(name) for name in wanted])
    return pa.concat_tables([schema.empty_table(), *read_files(folder, columns).values()])


def read_files(folder: Path, columns: Sequence[str] = SCHEMA.names) -> dict[str, pa.Table]:
    """Return the log as `read_log` does, but one table per file name; raises the same errors."""
    tables, num = {}, 0
    for name in _names(folder):
        tables[name] = table = read_file(folder, name, columns)
        numbers = table["number"].to_numpy()
        wrong = np.flatnonzero(numbers != np.arange(num, num + len(numbers)))
        if len(wrong):
            missing, there = num + wrong[0], numbers[wrong[0]]
            raise RecorderError(str(folder), f"record {missing} is missing: {there} stands in its place")
        num += len(numbers)
    return tables


def read_file(folder: Path, name: str, columns: Sequence[str] = SCHEMA.names) -> pa.Table:
    """Return one file of the log, from its stream or its Parquet."""
    wanted = list(dict.fromkeys(["number", *columns]))
    return _conformed(_read(folder, name, wanted), wanted, folder / name)


def _read(folder: Path, name: str, columns: Sequence[str]) -> pa.Table:
    """Read a file from its stream, or from Parquet if it was converted meanwhile."""
    try:
        return _read_stream(folder / f"{name}{STREAM}")
    except FileNotFoundError:
        path = folder / f"{name}{CLOSED}"
    try:
        known = set(pq.read_schema(path).names)
        return pq.read_table(path, columns=[c for c in columns if c in known], page_checksum_verification=True)
    except (OSError, pa.ArrowException) as error:
        raise RecorderError(str(path), f"is damaged ({first_line(error)})") from error


def _read_stream(path: Path) -> pa.Table:
    batches = list(whole_batches(path.read_bytes(), path))
    return pa.Table.from_batches(batches) if batches else SCHEMA.empty_table()


def whole_batches(data: bytes | pa.Buffer, where: Path) -> Iterator[pa.RecordBatch]:
    """Yield the batches in a stream's bytes, up to a torn one.

    Raises RecorderError if an altered batch is not the last one: a crash cannot cause that.
    """
    source = pa.BufferReader(data)
    try:
        reader = pa.ipc.open_stream(source)
    except (OSError, pa.ArrowException):
        return
    while True:
        try:
            batch, metadata = reader.read_next_batch_with_custom_metadata()
            batch.validate(full=True)
            is_whole = metadata[CHECKSUM] == _checksum(batch)
        except StopIteration:
            return
        except (OSError, pa.ArrowException):
            is_whole = False
        if is_whole:
            yield batch
        elif source.tell() < len(data):
            raise RecorderError(str(where), f"is damaged before byte {source.tell():,}")
        else:
            return


def _conformed(table: pa.Table, columns: Sequence[str], where: Path) -> pa.Table:
    """Return the columns in the types of SCHEMA, whichever version wrote them."""
    version = (table.schema.metadata or {}).get(VERSION)
    if version != SCHEMA.metadata[VERSION]:
        raise RecorderError(str(where), f"holds records of version {version!r}, not {SCHEMA.metadata[VERSION]!r}")
    arrays = []
    for field in (SCHEMA.field(name) for name in columns):
        try:
            known = field.name in table.column_names
            arrays.append(table[field.name].cast(field.type) if known else pa.nulls(len(table), field.type))
        except pa.ArrowException as error:
            raise RecorderError(str(where), f"{field.name} is no {field.type} ({first_line(error)})") from error
    return pa.table(arrays, schema=pa.schema([SCHEMA.field(name) for name in columns]))
