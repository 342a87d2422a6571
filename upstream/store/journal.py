"""Durability: the store's records, leases and revisions in an SQLite file (`--data-dir`).

SQLite's write-ahead log serves as the log of the store. The changes of a write are first recorded in memory; `commit`
writes them to the file in one transaction. After that they survive kill -9 and, with the file's `synchronous=FULL`, a
power cut too. At the start the whole file is read back; the store itself stays in memory.

The directory of a real etcd is refused. A file of another program, of a newer release, or with damage is refused and
not written to: the checks read its first bytes, then open it read-only. SQLite detects damage to its own structure
only, so each record has a checksum. Only one process at a time may have the file open.

Tables: `records`, one row per change as in the revision log, without those that compactions dropped; `leases`;
`auth`, users and roles; `alarms`; `meta`, one row of numbers.
"""

from __future__ import annotations

import sqlite3
import struct
import zlib
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError

from proto.pb import rpc_pb2
from upstream.store.alarms import Alarm
from upstream.store.auth import Auth
from upstream.store.index import RevisionRecord
from upstream.store.mvcc import FIRST_REVISION, NEVER_COMPACTED, Changes
from upstream.store.recorder import JournalRecorder, Stored, StoreDataError

__all__ = ["FILE_NAME", "Journal", "StoreDataError"]

FILE_NAME = "store.db"

# "wmux": marks the store's files among SQLite files (SQLite's application_id, at byte 68 of the file).
APPLICATION_ID = 0x776D7578
FORMAT = 1
"""The version of the tables' layout (SQLite's user_version, at byte 60)."""

_NUMBERS = struct.Struct("<5q?q")
_MAGIC = b"SQLite format 3\x00"
_HEADER_BYTES = 100
_USER_VERSION = slice(60, 64)
_APPLICATION_ID = slice(68, 72)

_SCHEMA = """
CREATE TABLE records (
    mod_revision INTEGER NOT NULL, sub_revision INTEGER NOT NULL, key BLOB NOT NULL, value BLOB NOT NULL,
    create_revision INTEGER NOT NULL, version INTEGER NOT NULL, lease INTEGER NOT NULL, deleted INTEGER NOT NULL,
    checksum INTEGER NOT NULL,
    PRIMARY KEY (mod_revision, sub_revision)
) WITHOUT ROWID;
CREATE TABLE leases (id INTEGER PRIMARY KEY, ttl_s INTEGER NOT NULL);
CREATE TABLE auth (name TEXT PRIMARY KEY, data BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE alarms (data BLOB NOT NULL);
CREATE TABLE meta (
    cluster_id INTEGER NOT NULL, member_id INTEGER NOT NULL,
    revision INTEGER NOT NULL, compact_revision INTEGER NOT NULL
);
"""


class Journal(JournalRecorder):
    """A recorder that stores everything in a file."""

    def __init__(self, directory: Path, cluster_id: int, member_id: int) -> None:
        """Open the directory's file, or create both; the ids are used for a new file only.

        Raises StoreDataError. The file's contents are held until `take_stored` returns them.
        """
        self.path = directory / FILE_NAME
        self._records: list[RevisionRecord] = []
        self._dropped: list[RevisionRecord] = []
        self._leases: dict[int, int | None] = {}
        self._auth: dict[str, bytes] = {}
        self._alarms: list[Alarm] | None = None
        self._compact_revision: int | None = None
        # True during a commit, and after a commit that failed: then nothing is written any more.
        self._failed = False
        with self._explained("be opened"):
            if not self.path.exists():
                _check_not_etcds(directory)
            directory.mkdir(parents=True, exist_ok=True)
            if not self.path.exists():
                _create(self.path, cluster_id, member_id)
            self._check_ours()
            self._stored: Stored | None = self._read()
            self._file = sqlite3.connect(self.path, isolation_level=None, timeout=0, check_same_thread=False)
            self._file.execute("PRAGMA locking_mode = EXCLUSIVE")
            self._file.execute("PRAGMA journal_mode = WAL")
            self._file.execute("PRAGMA synchronous = FULL")
            # Take the lock now, so that a second store on the same directory fails here, not at its first write.
            self._file.execute("BEGIN IMMEDIATE")
            self._file.execute("COMMIT")

    def take_stored(self) -> Stored:
        """Return the contents of the file as opened. Only once: the journal then drops its reference to them."""
        stored, self._stored = self._stored, None
        assert stored is not None
        return stored

    def changed(self, changes: Changes) -> None:
        self._records += changes

    def compacted(self, revision: int) -> None:
        self._compact_revision = revision

    def dropped(self, records: Iterable[RevisionRecord]) -> None:
        self._dropped += records

    def granted(self, lease_id: int, ttl_s: int) -> None:
        self._leases[lease_id] = ttl_s

    def revoked(self, lease_id: int) -> None:
        self._leases[lease_id] = None

    def auth_changed(self, rows: dict[str, bytes]) -> None:
        self._auth = rows

    def alarms_changed(self, alarms: list[Alarm]) -> None:
        self._alarms = alarms

    def _has_changes(self) -> bool:
        rows = self._records or self._leases or self._dropped or self._auth
        return bool(rows) or self._compact_revision is not None or self._alarms is not None

    def commit(self) -> None:
        if not self._has_changes():
            return
        self._failed = True
        with self._explained("be written"):
            file = self._file
            file.execute("BEGIN IMMEDIATE")
            if self._records:
                file.executemany("INSERT INTO records VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", map(_row, self._records))
                file.execute("UPDATE meta SET revision = ?", (self._records[-1].mod_revision,))
            if self._leases:
                file.executemany("DELETE FROM leases WHERE id = ?", [(lease_id,) for lease_id in self._leases])
                granted = [(lease_id, ttl_s) for lease_id, ttl_s in self._leases.items() if ttl_s is not None]
                file.executemany("INSERT INTO leases VALUES (?, ?)", granted)
            if self._auth:
                file.execute("DELETE FROM auth")
                file.executemany("INSERT INTO auth VALUES (?, ?)", self._auth.items())
            if self._alarms is not None:
                file.execute("DELETE FROM alarms")
                file.executemany("INSERT INTO alarms VALUES (?)", map(_alarm_row, self._alarms))
            if self._compact_revision is not None:
                file.execute("UPDATE meta SET compact_revision = ?", (self._compact_revision,))
            if self._dropped:
                places = [(record.mod_revision, record.sub_revision) for record in self._dropped]
                file.executemany("DELETE FROM records WHERE mod_revision = ? AND sub_revision = ?", places)
            file.execute("COMMIT")
        self._failed = False
        self._records.clear()
        self._leases.clear()
        self._dropped.clear()
        self._auth = {}
        self._alarms = None
        self._compact_revision = None

    def close(self) -> None:
        """Write pending changes, unless a write has failed, and close the file so that it needs no recovery."""
        try:
            if not self._failed:
                self.commit()
        finally:
            self._file.close()

    def _check_ours(self) -> None:
        """Check the file's first bytes, before SQLite opens the file. Raises StoreDataError."""
        with self.path.open("rb") as file:
            header = file.read(_HEADER_BYTES)
        if header[: len(_MAGIC)] != _MAGIC or len(header) < _HEADER_BYTES:
            raise self._unusable("is not a store's data file")
        if int.from_bytes(header[_APPLICATION_ID]) != APPLICATION_ID:
            raise self._unusable("is an SQLite file of another program")
        if (version := int.from_bytes(header[_USER_VERSION])) != FORMAT:
            raise self._unusable(f"has format {version}; this release supports format {FORMAT} only")

    def _read(self) -> Stored:
        """Read and check the file on a read-only connection. Raises _JournalDamaged, sqlite3.Error."""
        with closing(sqlite3.connect(f"file:{self.path}?mode=ro", uri=True, timeout=0)) as file:
            problems = [row[0] for row in file.execute("PRAGMA quick_check(1)")]
            if problems != ["ok"]:
                raise _JournalDamaged(" ".join(problems[0].split()))
            meta = file.execute("SELECT cluster_id, member_id, revision, compact_revision FROM meta").fetchall()
            if len(meta) != 1:
                raise _JournalDamaged("its revision is missing")
            rows = file.execute("SELECT * FROM records ORDER BY mod_revision, sub_revision")
            cluster_id, member_id, revision, compact_revision = meta[0]
            records = [_record(row) for row in rows]
            leases = file.execute("SELECT id, ttl_s FROM leases").fetchall()
            auth = dict(file.execute("SELECT name, data FROM auth").fetchall())
            alarms = [_alarm(data) for (data,) in file.execute("SELECT data FROM alarms")]
        stored = Stored(cluster_id, member_id, revision, compact_revision, records, leases, auth, alarms)
        if problem := _inconsistency(stored):
            raise _JournalDamaged(problem)
        return stored

    def _unusable(self, what: str) -> StoreDataError:
        return StoreDataError(f"{self.path} {what}; it was not changed; restore a copy or choose another --data-dir")

    @contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        """Turn file errors into StoreDataError with a text of one line."""
        try:
            yield
        except sqlite3.OperationalError as error:
            if "locked" in str(error):
                text = f"{self.path} is in use by another store; stop that one or choose another --data-dir"
                raise StoreDataError(text) from None
            raise StoreDataError(f"{self.path} cannot {what}: {error}; check the disk and its permissions") from None
        except sqlite3.DatabaseError as error:
            raise self._unusable(f"is damaged ({error})") from None
        except (_JournalDamaged, UnicodeDecodeError) as error:
            # SQLite's error texts quote the damaged data, which may not decode as UTF-8.
            raise self._unusable(f"is damaged ({error})") from None
        except OSError as error:
            reason = error.strerror or error
            raise StoreDataError(f"{self.path} cannot {what}: {reason}; check the disk and its permissions") from None


def _check_not_etcds(directory: Path) -> None:
    """Raise StoreDataError if etcd keeps its data in the directory, in the one above it, or in `member` below it."""
    for place in (directory / "member", directory, directory.parent):
        # etcd/server/storage/datadir/datadir.go: <data-dir>/member/snap/db; the wal may be elsewhere (--wal-dir).
        if (place / "snap" / "db").is_file():
            text = f"{directory} holds the data of an etcd, which this store cannot read; nothing was changed"
            raise StoreDataError(f"{text}; choose another --data-dir")


def _create(path: Path, cluster_id: int, member_id: int) -> None:
    """Create an empty file, completely or not at all."""
    unfinished = path.with_suffix(".new")
    unfinished.unlink(missing_ok=True)
    # Not in WAL mode yet: the application_id must be in the file itself, not in its log.
    with closing(sqlite3.connect(unfinished, isolation_level=None)) as file:
        file.executescript(f"PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = {FORMAT}; {_SCHEMA}")
        numbers = (cluster_id, member_id, FIRST_REVISION, NEVER_COMPACTED)
        file.execute("INSERT INTO meta VALUES (?, ?, ?, ?)", numbers)
    unfinished.rename(path)


def _checksum(record: RevisionRecord) -> int:
    numbers = _NUMBERS.pack(
        record.mod_revision,
        record.sub_revision,
        record.create_revision,
        record.version,
        record.lease,
        record.deleted,
        len(record.key),
    )
    return zlib.crc32(record.value, zlib.crc32(record.key, zlib.crc32(numbers)))


def _row(record: RevisionRecord) -> tuple[int, int, bytes, bytes, int, int, int, bool, int]:
    return (
        record.mod_revision,
        record.sub_revision,
        record.key,
        record.value,
        record.create_revision,
        record.version,
        record.lease,
        record.deleted,
        _checksum(record),
    )


def _record(row: tuple[Any, ...]) -> RevisionRecord:
    """Make a record from its row. Raises _JournalDamaged."""
    mod_revision, sub_revision, key, value, create_revision, version, lease, deleted, checksum = row
    record = RevisionRecord(key, value, create_revision, mod_revision, sub_revision, version, lease, bool(deleted))
    try:
        right = _checksum(record) == checksum
    except (TypeError, struct.error):
        # A column has the wrong type.
        right = False
    if not right:
        raise _JournalDamaged(f"the checksum of revision {mod_revision} is wrong")
    return record


class _JournalDamaged(Exception):
    """The file is damaged; the text describes the damage."""


def _alarm_row(alarm: Alarm) -> tuple[bytes]:
    # As a message, because a member id may have 64 bits and SQLite's integers are signed.
    return (rpc_pb2.AlarmMember(memberID=alarm[0], alarm=alarm[1]).SerializeToString(),)


def _alarm(data: bytes) -> Alarm:
    try:
        member = rpc_pb2.AlarmMember.FromString(data)
    except (DecodeError, TypeError):
        raise _JournalDamaged("an alarm cannot be read") from None
    return member.memberID, member.alarm


def _inconsistency(stored: Stored) -> str | None:
    """Return how rows contradict each other although each is readable; None when they do not."""
    if any(not isinstance(number, int) for number in (stored.revision, stored.compact_revision)):
        return "its revision is not a number"
    try:
        Auth().load(stored.auth)
    except (DecodeError, ValueError, TypeError, AttributeError):
        return "its users and roles cannot be read"
    attached: dict[bytes, int] = {}
    for record in stored.records:
        if record.lease:
            attached[record.key] = record.lease
        else:
            attached.pop(record.key, None)
    if missing := set(attached.values()) - {lease_id for lease_id, _ in stored.leases}:
        return f"lease {min(missing):x} is missing"
    # Every revision above the compact revision changed something, and its changes are numbered without gaps.
    expected = max(stored.compact_revision, FIRST_REVISION) + 1
    sub = 0
    for record in stored.records:
        if record.mod_revision < expected - 1 or record.mod_revision <= stored.compact_revision:
            continue
        if record.mod_revision == expected:
            expected += 1
            sub = 0
        if record.mod_revision != expected - 1 or record.sub_revision != sub:
            return f"revision {expected} is missing"
        sub += 1
    if expected != stored.revision + 1:
        return f"its newest revision is {stored.revision}, but its records end at {expected - 1}"
    return None
