"""The SQLite file of human feedback: its tables, its schema version and how a process opens it.

Rows are added, never changed: undone feedback gets a row in `retractions` and stays as history. Only a reward model's
opinion of a candidate pair is replaced by that of a newer model.
"""

from __future__ import annotations

import secrets
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tenacity import retry, retry_if_exception, stop_after_delay, wait_random

from cluster.errors import InputError

SCHEMA_VERSION = 2
BUSY_TIMEOUT_S = 10.0
TABLES = (
    "CREATE TABLE identity (store TEXT NOT NULL)",
    """CREATE TABLE pairs (
        position INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, prompt TEXT NOT NULL, first TEXT NOT NULL,
        second TEXT NOT NULL, policy_version TEXT, columns TEXT NOT NULL, first_reward REAL, second_reward REAL,
        uncertainty REAL, scorer_version TEXT, ticket REAL NOT NULL, time TEXT NOT NULL)""",
    """CREATE TABLE feedback (
        position INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, kind TEXT NOT NULL, annotator TEXT NOT NULL,
        token TEXT, time TEXT NOT NULL, policy_version TEXT, pair TEXT REFERENCES pairs (id), prompt TEXT NOT NULL,
        first TEXT, second TEXT, choice TEXT, response TEXT, score REAL, lowest REAL, highest REAL, corrected TEXT)""",
    """CREATE TABLE retractions (
        position INTEGER PRIMARY KEY, feedback TEXT NOT NULL UNIQUE REFERENCES feedback (id),
        annotator TEXT NOT NULL, token TEXT, time TEXT NOT NULL)""",
    "CREATE INDEX feedback_of_pair ON feedback (pair, annotator)",
    "CREATE INDEX feedback_of_annotator ON feedback (annotator)",
    """CREATE VIEW active AS SELECT * FROM feedback
        WHERE NOT EXISTS (SELECT 1 FROM retractions WHERE retractions.feedback = feedback.id)""",
)
UPGRADES = {1: "ALTER TABLE pairs ADD COLUMN scorer_version TEXT"}
"""The statement that upgrades a file of a version to the next version."""


def open_to_write(path: Path) -> sqlite3.Connection:
    """Open a connection with durable commits; create a missing file, upgrade an older one.

    Other processes may write the same file; each waits for the others for at most BUSY_TIMEOUT_S. Raises InputError for
    a file that a newer program wrote, that has other content, or that cannot be opened.
    """
    with _named(path):
        connection = sqlite3.connect(path, timeout=BUSY_TIMEOUT_S, isolation_level=None)
        try:
            _check_version(path, connection)
            _use_wal(connection)
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("PRAGMA foreign_keys = ON")
            with transaction(connection):
                _bring_up_to_date(connection, _check_version(path, connection))
        except BaseException:
            connection.close()
            raise
        connection.row_factory = sqlite3.Row
        return connection


def open_to_read(path: Path) -> sqlite3.Connection:
    """Open a read-only connection. Raises InputError as `open_to_write` does, and if there is no file."""
    if not path.is_file():
        raise InputError(str(path), "no such file of feedback (antiphon label makes one)")
    with _named(path):
        uri = f"{path.absolute().as_uri()}?mode=ro"
        connection = sqlite3.connect(uri, timeout=BUSY_TIMEOUT_S, isolation_level=None, uri=True)
        try:
            if not _check_version(path, connection):
                raise InputError(str(path), "holds no feedback tables yet")
        except BaseException:
            connection.close()
            raise
        connection.row_factory = sqlite3.Row
        return connection


@contextmanager
def transaction(connection: sqlite3.Connection, mode: str = "IMMEDIATE") -> Iterator[None]:
    """Commit everything in the block or nothing; with mode DEFERRED, read one consistent snapshot."""
    connection.execute(f"BEGIN {mode}")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def _is_busy(error: BaseException) -> bool:
    return isinstance(error, sqlite3.OperationalError) and error.sqlite_errorcode == sqlite3.SQLITE_BUSY


@retry(
    retry=retry_if_exception(_is_busy),
    stop=stop_after_delay(BUSY_TIMEOUT_S),
    wait=wait_random(0.01, 0.1),
    reraise=True,
)
def _use_wal(connection: sqlite3.Connection) -> None:
    """Switch to WAL mode, with retries: SQLite does not wait for other processes to change the mode."""
    connection.execute("PRAGMA journal_mode = WAL")


@contextmanager
def _named(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise InputError(str(path), f"cannot be opened as a file of feedback ({error})") from error


def _check_version(path: Path, connection: sqlite3.Connection) -> int:
    """Return the file's version, 0 if it is empty, in one statement: others may be creating tables."""
    query = "SELECT user_version, (SELECT count(*) FROM sqlite_master) FROM pragma_user_version"
    version, num_tables = connection.execute(query).fetchone()
    if version > SCHEMA_VERSION:
        what = f"has version {version}, and this program reads up to {SCHEMA_VERSION}: use a newer Antiphon"
        raise InputError(str(path), what)
    if not version and num_tables:
        raise InputError(str(path), "is an SQLite file with other content")
    return int(version)


def _bring_up_to_date(connection: sqlite3.Connection, version: int) -> None:
    if not version:
        for statement in TABLES:
            connection.execute(statement)
        connection.execute("INSERT INTO identity VALUES (?)", (secrets.token_hex(8),))
    else:
        for older in range(version, SCHEMA_VERSION):
            connection.execute(UPGRADES[older])
    connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
