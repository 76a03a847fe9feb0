"""The SQLite file of human feedback: its tables, its version and how a process opens it. Knows no rule of feedback.

Rows are added, never changed: what was undone has a row in `retractions` and stays as history. Only what a reward
model says of a candidate pair is replaced by what a newer one says.
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
"""What makes a file of that version one of the next."""


def open_to_write(path: Path) -> sqlite3.Connection:
    """A connection whose commits are on disk when they return; makes the file where there is none, or brings an older
    one up to date.

    Another process may write the same file: each waits for the other, at most BUSY_TIMEOUT_S. Raises InputError
    naming a file that is newer than this program, that is something else, or that cannot be opened.
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
    """A connection that can write nothing. Raises InputError as `open_to_write` does, and where there is no file."""
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
    """All of it or nothing; with mode DEFERRED, one unchanging picture to read."""
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
    """Again while another process opens the file: to change the mode SQLite waits for nobody."""
    connection.execute("PRAGMA journal_mode = WAL")


@contextmanager
def _named(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise InputError(str(path), f"cannot be opened as a file of feedback ({error})") from error


def _check_version(path: Path, connection: sqlite3.Connection) -> int:
    """The file's version, 0 where it is empty; one statement, for another process may be making the tables."""
    query = "SELECT user_version, (SELECT count(*) FROM sqlite_master) FROM pragma_user_version"
    version, num_tables = connection.execute(query).fetchone()
    if version > SCHEMA_VERSION:
        what = f"is of version {version} and this program reads up to {SCHEMA_VERSION}: use a newer Antiphon"
        raise InputError(str(path), what)
    if not version and num_tables:
        raise InputError(str(path), "is an SQLite file of something else")
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
