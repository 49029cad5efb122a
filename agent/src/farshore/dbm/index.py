"""The index: what the source knows of the replica, path by path.

An SQLite database per group, used by one thread at a time. Changes belong to the transaction that is being sent:
``commit`` takes them over when the replica has acknowledged it, ``rollback`` forgets them. After a crash the index
is at worst older than the replica, which costs a repetition and never a difference.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from farshore.errors import StateError
from farshore.fmm.types import FileKind, Observed

_VERSION = 1
#: The facts that tell which state of which replica the entries are; ``clear`` forgets them.
LINEAGE = "lineage"
SEQ = "seq"
_INT64 = 1 << 63
_DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
_SCHEMA = """
CREATE TABLE IF NOT EXISTS entries (
  root INTEGER NOT NULL, path BLOB NOT NULL, parent BLOB, kind INTEGER NOT NULL,
  mode INTEGER NOT NULL, uid INTEGER NOT NULL, gid INTEGER NOT NULL, size INTEGER NOT NULL,
  mtime_ns INTEGER NOT NULL, ctime_ns INTEGER NOT NULL, dev INTEGER NOT NULL, ino INTEGER NOT NULL,
  nlink INTEGER NOT NULL, rdev INTEGER NOT NULL, target BLOB, xattrs BLOB NOT NULL, digest BLOB,
  PRIMARY KEY (root, path)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS by_parent ON entries (root, parent);
CREATE INDEX IF NOT EXISTS by_inode ON entries (ino, dev);
CREATE TABLE IF NOT EXISTS signatures (
  root INTEGER NOT NULL, path BLOB NOT NULL, signature BLOB NOT NULL, PRIMARY KEY (root, path));
CREATE TABLE IF NOT EXISTS facts (key TEXT PRIMARY KEY, value BLOB NOT NULL);
"""
_COLUMNS = "root, path, kind, mode, uid, gid, size, mtime_ns, ctime_ns, dev, ino, nlink, rdev, target, xattrs, digest"
_xattr_encoder = msgspec.msgpack.Encoder()
_xattr_decoder = msgspec.msgpack.Decoder(tuple[tuple[bytes, bytes], ...])


class IndexDamaged(StateError):
    """The index {0} is damaged: {1}"""


@dataclass(frozen=True, slots=True)
class Known:
    """What the replica holds at a path, and the identity of what it was made from here.

    ``ctime_ns`` is 0 when the content here must be read before it counts as the same: after a comparison with a
    replica that another history made, or when the file changed while, or too shortly before, it was read.
    """

    root: int
    path: bytes
    kind: FileKind
    mode: int
    uid: int
    gid: int
    size: int
    mtime_ns: int
    ctime_ns: int
    dev: int
    ino: int
    nlink: int
    rdev: int
    target: bytes | None
    xattrs: tuple[tuple[bytes, bytes], ...]
    digest: bytes | None

    def same_identity(self, seen: Observed) -> bool:
        """True when nothing that lstat tells has changed since the replica acknowledged this state."""
        return (
            self.ctime_ns == seen.ctime_ns
            and self.ino == seen.ino
            and self.dev == seen.dev
            and self.size == seen.size
            and self.mtime_ns == seen.mtime_ns
            and self.kind == seen.kind
        )

    def listed_alike(self, seen: Observed) -> bool:
        """True for a file that a replica which was in step has listed with what was seen, of one name only."""
        return (
            self.ino == 0
            and self.digest is None
            and self.kind == seen.kind == FileKind.FILE
            and self.nlink == seen.nlink == 1
            and (self.size, self.mtime_ns) == (seen.size, seen.mtime_ns)
        )

    def same_meta(self, seen: Observed) -> bool:
        """True when the replica's metadata is what was seen; access times never count as a difference."""
        return (
            self.mode == seen.mode
            and self.uid == seen.uid
            and self.gid == seen.gid
            and self.xattrs == seen.xattrs
            and self.mtime_ns == seen.mtime_ns
        )


def parent_of(path: bytes) -> bytes | None:
    """The directory that holds ``path``, b"" for the root, None for the root itself."""
    return path.rpartition(b"/")[0] if path else None


def below(path: bytes) -> tuple[bytes, bytes]:
    """Half-open range of the paths strictly below ``path``; b"0" follows b"/" in byte order."""
    return (path + b"/", path + b"0") if path else (b"\x01", b"\xff" * 4200)


def clamp_time(nanoseconds: int) -> int:
    """The nearest time that 64 bits hold: filesystems know years beyond 2262, SQLite and the wire do not."""
    return max(-_INT64, min(_INT64 - 1, nanoseconds))


def is_damage(error: BaseException) -> bool:
    """True when SQLite says that the file is no sound database, so that only a new one helps."""
    # The low byte is the plain code; extended ones tell more in the bits above.
    return isinstance(error, sqlite3.Error) and getattr(error, "sqlite_errorcode", 0) & 0xFF in _DAMAGED


def set_aside(path: Path) -> Path:
    """Rename a closed database and what belongs to it, so that a new one can be made; returns the new name."""
    aside = path.with_name(path.name + ".damaged")
    for suffix in ("-wal", "-shm", ""):
        old, new = path.with_name(path.name + suffix), aside.with_name(aside.name + suffix)
        new.unlink(missing_ok=True)
        if old.exists():
            old.rename(new)
    return aside


class Index:
    """The database of one group.

    Raises IndexDamaged when the file is no sound database, StateError when it cannot be used for another reason.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        except sqlite3.Error as error:
            raise StateError(str(path), f"the index is not usable: {error}") from error
        try:
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=NORMAL")
            self._db.execute("PRAGMA cache_size=-32768")
            (version,) = self._db.execute("PRAGMA user_version").fetchone()
            if version not in (0, _VERSION):
                raise StateError(str(path), f"is of version {version}; this program knows {_VERSION}")
            self._db.executescript(_SCHEMA + f"PRAGMA user_version={_VERSION};")
        except BaseException as error:
            self._db.close()
            if is_damage(error):
                raise IndexDamaged(str(path), error) from error
            if isinstance(error, sqlite3.Error):
                raise StateError(str(path), f"the index is not usable: {error}") from error
            raise

    def close(self) -> None:
        """Drop what was not committed and close the file."""
        try:
            self.rollback()
        finally:
            self._db.close()

    # --- transactions

    def begin(self) -> None:
        """Start collecting the changes of one transaction."""
        if not self._db.in_transaction:
            self._db.execute("BEGIN")

    def commit(self) -> None:
        """The replica has acknowledged: the changes are facts."""
        if self._db.in_transaction:
            self._db.execute("COMMIT")

    def rollback(self) -> None:
        """The replica has not acknowledged: forget the changes."""
        if self._db.in_transaction:
            self._db.execute("ROLLBACK")

    # --- facts about the whole

    def get_fact(self, key: str) -> bytes | None:
        """A stored value, for example the replica's lineage; None when there is none."""
        row = self._db.execute("SELECT value FROM facts WHERE key=?", (key,)).fetchone()
        return bytes(row[0]) if row else None

    def set_fact(self, key: str, value: bytes) -> None:
        """Store a value with the transaction."""
        self._db.execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", (key, value))

    def clear(self) -> None:
        """Forget everything about the replica; facts about this side stay."""
        for table in ("entries", "signatures"):
            self._db.execute(f"DELETE FROM {table}")  # noqa: S608 - the names stand above
        self._db.execute("DELETE FROM facts WHERE key IN (?, ?)", (LINEAGE, SEQ))

    def count(self) -> int:
        """Number of known paths."""
        return int(self._db.execute("SELECT count(*) FROM entries").fetchone()[0])

    # --- entries

    def get(self, root: int, path: bytes) -> Known | None:
        """What is known of one path."""
        row = self._db.execute(
            f"SELECT {_COLUMNS} FROM entries WHERE root=? AND path=?",  # noqa: S608
            (root, path),
        ).fetchone()
        return _known(row) if row else None

    def by_inode(self, root: int, dev: int, ino: int) -> list[Known]:
        """The paths of ``root`` that were made from this inode."""
        rows = self._db.execute(
            f"SELECT {_COLUMNS} FROM entries WHERE ino=? AND dev=? AND root=?",  # noqa: S608
            (_signed(ino), _signed(dev), root),
        )
        return [_known(row) for row in rows]

    def linked_below(self, root: int, path: bytes) -> list[Known]:
        """The files below a directory that had more than one name."""
        low, high = below(path)
        rows = self._db.execute(
            f"SELECT {_COLUMNS} FROM entries WHERE root=? AND path>=? AND path<? AND nlink>1 AND kind=?",  # noqa: S608
            (root, low, high, int(FileKind.FILE)),
        )
        return [_known(row) for row in rows]

    def longest_below(self, root: int, path: bytes) -> int:
        """Length of the longest known path below a directory; 0 when nothing is known below it."""
        low, high = below(path)
        query = "SELECT max(length(path)) FROM entries WHERE root=? AND path>=? AND path<?"
        return int(self._db.execute(query, (root, low, high)).fetchone()[0] or 0)

    def children(self, root: int, path: bytes) -> list[bytes]:
        """Paths directly below a directory."""
        rows = self._db.execute("SELECT path FROM entries WHERE root=? AND parent=?", (root, path))
        return [bytes(row[0]) for row in rows]

    def put(self, entry: Known) -> None:
        """Take over an entry, replacing what was known of its path."""
        self._db.execute(
            "INSERT OR REPLACE INTO entries VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?)",
            (
                entry.root,
                entry.path,
                parent_of(entry.path),
                int(entry.kind),
                entry.mode,
                entry.uid,
                entry.gid,
                entry.size,
                entry.mtime_ns,
                entry.ctime_ns,
                _signed(entry.dev),
                _signed(entry.ino),
                entry.nlink,
                _signed(entry.rdev),
                entry.target,
                _xattr_encoder.encode(entry.xattrs),
                entry.digest,
            ),
        )

    def put_all(self, entries: Iterable[Known]) -> None:
        """Take over many entries."""
        for entry in entries:
            self.put(entry)

    def remove(self, root: int, path: bytes) -> None:
        """Forget a path and all below it."""
        low, high = below(path)
        for table in ("entries", "signatures"):
            self._db.execute(
                f"DELETE FROM {table} WHERE root=? AND (path=? OR (path>=? AND path<?))",  # noqa: S608
                (root, path, low, high),
            )

    def move(self, root: int, path: bytes, to: bytes) -> None:
        """What was known at ``path`` and below is known at ``to``."""
        self.remove(root, to)
        low, high = below(path)
        rows = self._db.execute(
            "SELECT path FROM entries WHERE root=? AND (path=? OR (path>=? AND path<?))", (root, path, low, high)
        ).fetchall()
        for (old,) in rows:
            new = to + bytes(old)[len(path) :]
            self._db.execute(
                "UPDATE entries SET path=?, parent=? WHERE root=? AND path=?", (new, parent_of(new), root, old)
            )
            self._db.execute("UPDATE signatures SET path=? WHERE root=? AND path=?", (new, root, old))

    # --- signatures of large files

    def get_signature(self, root: int, path: bytes) -> bytes | None:
        """The block hashes of what the replica has at ``path``, as ``delta.Signature.to_bytes`` made them."""
        row = self._db.execute("SELECT signature FROM signatures WHERE root=? AND path=?", (root, path)).fetchone()
        return bytes(row[0]) if row else None

    def set_signature(self, root: int, path: bytes, signature: bytes | None) -> None:
        """Store or (None) forget the block hashes of a path."""
        if signature is None:
            self._db.execute("DELETE FROM signatures WHERE root=? AND path=?", (root, path))
        else:
            self._db.execute("INSERT OR REPLACE INTO signatures VALUES (?,?,?)", (root, path, signature))

    def __iter__(self) -> Iterator[Known]:
        for row in self._db.execute(f"SELECT {_COLUMNS} FROM entries ORDER BY root, path"):  # noqa: S608
            yield _known(row)


def _signed(number: int) -> int:
    """SQLite's integers are signed; inode and device numbers may use all 64 bits."""
    return number - (1 << 64) if number >= 1 << 63 else number


def _known(row: tuple[Any, ...]) -> Known:
    values = list(row)
    for i in (9, 10, 12):
        values[i] %= 1 << 64
    values[2] = FileKind(values[2])
    values[14] = _xattr_decoder.decode(values[14])
    return Known(*values)
