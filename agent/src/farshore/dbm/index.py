"""The index: what the source knows of the replica, path by path.

An SQLite database per group, used by one thread at a time. Changes belong to the transaction that is being sent:
``commit`` takes them over when the replica has acknowledged it, ``rollback`` forgets them. After a crash the index
is at worst older than the replica, which costs a repetition and never a difference.
"""

from __future__ import annotations

import os
import secrets
import sqlite3
import stat
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from farshore.dbm.messages import INLINE_MAX
from farshore.errors import StateError
from farshore.fmm.scanner import kind_of
from farshore.fmm.sums import Marker, Sum
from farshore.fmm.types import FileKind, Observed

_VERSION = 3
#: The facts that tell which state of which replica the entries are; ``clear`` forgets them.
LINEAGE = "lineage"
SEQ = "seq"
#: Facts about this side: in which boot of the machine the index was used last, and when it was committed last (ns).
_BOOT = "boot"
_COMMITTED = "committed"
#: So long after a change, the content of a file that was not synced may not be on disk, while what lstat tells is:
#: the kernel begins to write content back after 30 s (vm.dirty_expire_centisecs), and a slow disk takes its time.
_WRITE_BACK_NS = 600 * 10**9
#: The names of the roots that the entries' numbers stand for (JSON).
ROOTS = "roots"
#: Whether the replica may hold transactions of a state that is not complete.
OPEN = "open"
#: The rules, of what is protected below the roots, by which everything was looked at.
RULES = "rules"
#: The key of the entries' marks.
_KEY = "key"
_INT64 = 1 << 63
#: Inodes are looked into by blocks of 16, as filesystems give new files numbers that lie next to each other; more at
#: once would cost too much where only one is asked for. Of so many blocks it is remembered which inodes are known, at
#: most; and none is read further than so many entries.
_BLOCK_BITS = 4
_MOST_BLOCKS = 1024
_MOST_IN_BLOCK = 64
_DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
# The directory comes first in the key, so that what lies in one, and all that lies below one, are ranges of it.
_SCHEMA = f"""
CREATE TABLE IF NOT EXISTS entries (
  root INTEGER NOT NULL, parent BLOB NOT NULL, name BLOB NOT NULL, kind INTEGER NOT NULL,
  mode INTEGER NOT NULL, uid INTEGER NOT NULL, gid INTEGER NOT NULL, size INTEGER NOT NULL,
  mtime_ns INTEGER NOT NULL, ctime_ns INTEGER NOT NULL, dev INTEGER NOT NULL, ino INTEGER NOT NULL,
  nlink INTEGER NOT NULL, rdev INTEGER NOT NULL, target BLOB, xattrs BLOB, digest BLOB, told_ns INTEGER NOT NULL,
  mark INTEGER NOT NULL,
  PRIMARY KEY (root, parent, name)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS by_inode ON entries (ino, dev);
CREATE INDEX IF NOT EXISTS by_size ON entries (size) WHERE kind = {int(FileKind.FILE)} AND size > {INLINE_MAX};
CREATE TABLE IF NOT EXISTS signatures (
  root INTEGER NOT NULL, path BLOB NOT NULL, signature BLOB NOT NULL, PRIMARY KEY (root, path));
CREATE TABLE IF NOT EXISTS facts (key TEXT PRIMARY KEY, value BLOB NOT NULL);
"""
_COLUMNS = "kind, mode, uid, gid, size, mtime_ns, ctime_ns, dev, ino, nlink, rdev, target, xattrs, digest, told_ns"
_GET = f"SELECT {_COLUMNS} FROM entries WHERE root=? AND parent=? AND name=?"  # noqa: S608
_PUT = "INSERT OR REPLACE INTO entries VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?)"
_BY_INODE = f"SELECT parent, name, {_COLUMNS} FROM entries WHERE ino=? AND dev=? AND root=?"  # noqa: S608
_INODES = "SELECT ino FROM entries WHERE ino>=? AND ino<=? LIMIT ?"
_LIKE = (
    f"SELECT root, parent, name, {_COLUMNS} FROM entries WHERE size=? AND size>{INLINE_MAX} "  # noqa: S608
    f"AND kind={int(FileKind.FILE)} AND digest=?"
)
_SIZE = f"SELECT 1 FROM entries WHERE size=? AND size>{INLINE_MAX} AND kind={int(FileKind.FILE)} LIMIT 1"  # noqa: S608
_LISTED = f"SELECT name, {_COLUMNS} FROM entries WHERE root=? AND parent=?"  # noqa: S608
#: Halves, as a sum must not exceed 63 bits.
_SUMS = (
    "SELECT parent, count(*), sum(mark & 4294967295), sum((mark >> 32) & 4294967295) FROM entries "
    "WHERE root=? AND {} GROUP BY parent"
)
_MANY = "SELECT count(*) FROM (SELECT 1 FROM entries WHERE root=? AND {} LIMIT ?)"
_TYPES = {
    FileKind.FILE: stat.S_IFREG,
    FileKind.DIRECTORY: stat.S_IFDIR,
    FileKind.SYMLINK: stat.S_IFLNK,
    FileKind.FIFO: stat.S_IFIFO,
    FileKind.CHARACTER_DEVICE: stat.S_IFCHR,
    FileKind.BLOCK_DEVICE: stat.S_IFBLK,
    FileKind.SOCKET: stat.S_IFSOCK,
}
_ALL = f"SELECT root, parent, name, {_COLUMNS} FROM entries ORDER BY root, parent, name"  # noqa: S608
#: Where the root itself is filed: no directory has this path.
_ABOVE_ROOT = b"/"
_TABLES = ("entries", "signatures", "facts")
_xattr_encoder = msgspec.msgpack.Encoder()
_xattr_decoder = msgspec.msgpack.Decoder(tuple[tuple[bytes, bytes], ...])


class IndexDamaged(StateError):
    """The index {0} is damaged: {1}"""


class Known(msgspec.Struct, frozen=True, gc=False):
    """What the replica holds at a path, and the identity of what it was made from here.

    ``ctime_ns`` is 0 when the content here must be read before it counts as the same: after a comparison with a
    replica that another history made, when the file changed while, or too shortly before, it was read, or when a power
    cut may have taken it back. ``told_ns``: the wall clock when the last transaction that changed it was made, 0 if
    that is not known.
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
    told_ns: int = 0

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

    def is_unchanged(self, status: os.stat_result) -> bool:
        """True when nothing that lstat tells has changed, as ``same_identity``, and nor have mode and owner."""
        return (
            self.ctime_ns == clamp_time(status.st_ctime_ns) != 0
            and self.ino == status.st_ino
            and self.dev == status.st_dev
            and self.size == status.st_size
            and self.mtime_ns == clamp_time(status.st_mtime_ns)
            and self.mode == status.st_mode & 0o7777
            and (self.uid, self.gid) == (status.st_uid, status.st_gid)
            and self.kind is kind_of(status)
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


def _split(path: bytes) -> tuple[bytes, bytes]:
    """The key of a path: its directory and its name."""
    if not path:
        return _ABOVE_ROOT, b""
    above, _, name = path.rpartition(b"/")
    return above, name


def _joined(parent: bytes, name: bytes) -> bytes:
    return parent + b"/" + name if parent and name else name


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
        #: The directory that was found without entries last, and the names that were put into it since. All that a
        #: newly walked directory holds is asked for once, in vain, and this spares the question.
        self._bare: tuple[int, bytes] | None = None
        self._put_there: set[bytes] = set()
        #: Blocks of inodes that were looked into, and what is known in them: each number of an entry, and maybe others.
        self._blocks: set[int] = set()
        self._inodes: set[int] = set()
        try:
            self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        except sqlite3.Error as error:
            raise StateError(str(path), f"the index is not usable: {error}") from error
        try:
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=NORMAL")
            self._db.execute("PRAGMA cache_size=-32768")
            (version,) = self._db.execute("PRAGMA user_version").fetchone()
            if version > _VERSION:
                raise StateError(str(path), f"is of version {version}; this program knows {_VERSION}")
            if 0 < version < _VERSION:
                # All that it holds can be learnt anew by a full comparison, which costs less than a conversion's bugs.
                self._db.executescript("".join(f"DROP TABLE IF EXISTS {name};" for name in _TABLES))
            self._db.executescript(_SCHEMA + f"PRAGMA user_version={_VERSION};")
            key = secrets.token_bytes(8)
            self._db.execute("INSERT OR IGNORE INTO facts VALUES (?, ?)", (_KEY, key))
            self._key = int.from_bytes(self.get_fact(_KEY) or key, "big")
            self._marker = Marker(self._key)
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
            self.set_fact(_COMMITTED, b"%d" % time.time_ns())
            self._db.execute("COMMIT")

    def rollback(self) -> None:
        """The replica has not acknowledged: forget the changes."""
        self._bare = None
        # What was removed, and not found in them, comes back.
        self._forget_inodes()
        if self._db.in_transaction:
            self._db.execute("ROLLBACK")

    def begin_boot(self, boot: str) -> int:
        """This machine runs in ``boot``; returns how many files must be read again as it was another one.

        A power cut may have left a file's old content under what lstat told of the new one, which is what the replica
        has. So no content counts as known that had changed shortly before the index was committed last.
        """
        if self.get_fact(_BOOT) == boot.encode():
            return 0
        since = int(self.get_fact(_COMMITTED) or b"0") - _WRITE_BACK_NS
        self.begin()
        doubtful = self._db.execute(
            "UPDATE entries SET ctime_ns=0, mark=0 WHERE kind=? AND ctime_ns>?", (int(FileKind.FILE), max(since, 0))
        ).rowcount
        self.set_fact(_BOOT, boot.encode())
        self.commit()
        return doubtful

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
        parent, name = _split(path)
        if (root, parent) == self._bare and name not in self._put_there:
            return None
        row = self._db.execute(_GET, (root, parent, name)).fetchone()
        return _known(root, path, row) if row else None

    def by_inode(self, root: int, dev: int, ino: int) -> list[Known]:
        """The paths of ``root`` that were made from this inode."""
        return list(self.each_by_inode(root, dev, ino))

    def each_by_inode(self, root: int, dev: int, ino: int) -> Iterator[Known]:
        """As ``by_inode``, one after the other: who needs one only does not read them all. Put nothing meanwhile."""
        for parent, name, *row in self._db.execute(_BY_INODE, (_signed(ino), _signed(dev), root)):
            yield _known(root, _joined(parent, name), row)

    def may_have_inode(self, ino: int) -> bool:
        """False when surely no path was made from an inode of this number: cheaper than ``by_inode`` for new files."""
        block = ino >> _BLOCK_BITS
        if block not in self._blocks:
            if len(self._blocks) >= _MOST_BLOCKS:
                self._forget_inodes()
            first = block << _BLOCK_BITS
            last = first + (1 << _BLOCK_BITS) - 1
            # 0 is no inode, and may be that of all that the replica has listed.
            bounds = (_signed(first or 1), _signed(last), _MOST_IN_BLOCK)
            found = self._db.execute(_INODES, bounds).fetchall()
            if len(found) < _MOST_IN_BLOCK:
                self._inodes.update(known % (1 << 64) for (known,) in found)
            else:
                self._inodes.update(range(first, last + 1))
            self._blocks.add(block)
        return ino in self._inodes or not ino

    def _forget_inodes(self) -> None:
        self._blocks.clear()
        self._inodes.clear()

    def like(self, size: int, digest: bytes) -> list[Known]:
        """The large files of the replica that have this size in bytes and this BLAKE3-256."""
        rows = self._db.execute(_LIKE, (size, digest)).fetchall()
        return [_known(root, _joined(parent, name), row) for root, parent, name, *row in rows]

    def has_size(self, size: int) -> bool:
        """True when the replica has a large file of this size in bytes."""
        return self._db.execute(_SIZE, (size,)).fetchone() is not None

    def linked_below(self, root: int, path: bytes) -> list[Known]:
        """The files below a directory that had more than one name."""
        found = []
        for where, values in _below(path):
            query = (
                f"SELECT parent, name, {_COLUMNS} FROM entries "  # noqa: S608
                f"WHERE root=? AND {where} AND nlink>1 AND kind={int(FileKind.FILE)}"
            )
            for parent, name, *row in self._db.execute(query, (root, *values)):
                found.append(_known(root, _joined(parent, name), row))
        return found

    def exceeding_below(
        self, root: int, path: bytes, size: int | None, mtime_ns: int | None, mounts: bool
    ) -> Iterator[Known]:
        """The files below a directory that are larger than ``size``, or were modified before ``mtime_ns``.

        With ``mounts``, also the directories on which the replica has something mounted.
        """
        limit = (_INT64 - 1 if size is None else size, -_INT64 if mtime_ns is None else clamp_time(mtime_ns), mounts)
        for where, values in _below(path):
            query = (
                f"SELECT parent, name, {_COLUMNS} FROM entries WHERE root=? AND {where} "  # noqa: S608
                f"AND ((kind={int(FileKind.FILE)} AND (size>? OR mtime_ns<?)) "
                f"OR (? AND kind={int(FileKind.DIRECTORY)} AND rdev<>0))"
            )
            for parent, name, *row in self._db.execute(query, (root, *values, *limit)):
                yield _known(root, _joined(parent, name), row)

    def count_below(self, root: int, path: bytes) -> int:
        """Number of known paths below a directory."""
        total = 0
        for where, values in _below(path):
            query = f"SELECT count(*) FROM entries WHERE root=? AND {where}"  # noqa: S608
            total += int(self._db.execute(query, (root, *values)).fetchone()[0])
        return total

    def longest_below(self, root: int, path: bytes) -> int:
        """Length of the longest known path below a directory; 0 when nothing is known below it."""
        longest = 0
        for where, values in _below(path):
            query = f"SELECT max(length(parent) + 1 + length(name)) FROM entries WHERE root=? AND {where}"  # noqa: S608
            longest = max(longest, int(self._db.execute(query, (root, *values)).fetchone()[0] or 0))
        return longest

    def has_below(self, root: int, path: bytes, many: int) -> bool:
        """True when ``many`` paths, or more, are known below a directory."""
        found = 0
        for where, values in _below(path):
            if found < many:
                found += self._db.execute(_MANY.format(where), (root, *values, many - found)).fetchone()[0]
        return found >= many

    def sums(self, root: int, path: bytes) -> tuple[int, dict[bytes, Sum]]:
        """The key of the marks; and the sums of ``path``, a directory, and of all below it that hold anything."""
        found: dict[bytes, Sum] = {}
        for where, values in _below(path):
            for parent, entries, low, high in self._db.execute(_SUMS.format(where), (root, *values)):
                found[parent] = Sum(entries, low, high)
        return self._key, found

    def children(self, root: int, path: bytes) -> list[bytes]:
        """Paths directly below a directory."""
        rows = self._db.execute("SELECT name FROM entries WHERE root=? AND parent=?", (root, path)).fetchall()
        if not rows:
            self._bare = root, path
            self._put_there = set()
        return [_joined(path, name) for (name,) in rows]

    def put(self, entry: Known) -> None:
        """Take over an entry, replacing what was known of its path."""
        parent, name = _split(entry.path)
        if (entry.root, parent) == self._bare:
            self._put_there.add(name)
        if entry.ino >> _BLOCK_BITS in self._blocks:
            self._inodes.add(entry.ino)
        self._db.execute(
            _PUT,
            (
                entry.root,
                parent,
                name,
                entry.kind.value,
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
                _xattr_encoder.encode(entry.xattrs) if entry.xattrs else None,
                entry.digest,
                entry.told_ns,
                self._mark(name, entry),
            ),
        )

    def _mark(self, name: bytes, entry: Known) -> int:
        """The mark by which a directory's listing is compared; 0, which nothing has, for what must be looked at."""
        if not entry.ctime_ns or not entry.ino or entry.mode < 0:
            return 0
        return self._marker.mark(
            name,
            _TYPES[entry.kind] | entry.mode,
            entry.uid,
            entry.gid,
            entry.size,
            entry.mtime_ns,
            entry.ctime_ns,
            entry.dev,
            entry.ino,
        )

    def put_all(self, entries: Iterable[Known]) -> None:
        """Take over many entries."""
        for entry in entries:
            self.put(entry)

    def remove(self, root: int, path: bytes) -> None:
        """Forget a path and all below it."""
        self._db.execute("DELETE FROM entries WHERE root=? AND parent=? AND name=?", (root, *_split(path)))
        for where, values in _below(path):
            self._db.execute(f"DELETE FROM entries WHERE root=? AND {where}", (root, *values))  # noqa: S608
        self._db.execute(
            "DELETE FROM signatures WHERE root=? AND (path=? OR (path>=? AND path<?))",
            (root, path, path + b"/", path + b"0") if path else (root, b"", b"", b"\xff" * 4200),
        )

    def move(self, root: int, path: bytes, to: bytes) -> None:
        """What was known at ``path`` and below is known at ``to``."""
        self.remove(root, to)
        self._bare = None
        parent, name = _split(to)
        self._db.execute(
            "UPDATE entries SET parent=?, name=? WHERE root=? AND parent=? AND name=?",
            (parent, name, root, *_split(path)),
        )
        moved = self.get(root, to)
        if moved is not None:
            # Its mark goes by its name.
            self.put(moved)
        for column, table in (("parent", "entries"), ("path", "signatures")):
            # "||" makes text of bytes, without looking at them; the cast takes that back.
            self._db.execute(
                f"UPDATE {table} SET {column}=CAST(? || substr({column}, ?) AS BLOB) "  # noqa: S608
                f"WHERE root=? AND ({column}=? OR ({column}>=? AND {column}<?))",
                (to, len(path) + 1, root, path, path + b"/", path + b"0"),
            )

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
        for root, parent, name, *row in self._db.execute(_ALL):
            yield _known(root, _joined(parent, name), row)


class IndexView:
    """What an index holds in its committed state, for reading beside its user: each call sees the state of its moment.

    For one thread. Raises StateError when the index cannot be read.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._db = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, check_same_thread=False)
        except sqlite3.Error as error:
            raise StateError(str(path), f"the index is not readable: {error}") from error
        self._path = path

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def children(self, root: int, path: bytes) -> list[Known]:
        """What is known of all that lies directly in a directory."""
        try:
            rows = self._db.execute(_LISTED, (root, path)).fetchall()
        except sqlite3.Error as error:
            raise StateError(str(self._path), f"the index is not readable: {error}") from error
        return [_known(root, _joined(path, name), row) for name, *row in rows]


def _below(path: bytes) -> list[tuple[str, tuple[bytes, ...]]]:
    """Conditions that together, and each for itself a range of the key, are true of all that lies below ``path``."""
    if not path:
        return [("parent<>?", (_ABOVE_ROOT,))]
    # "0" follows "/" in the order of bytes.
    return [("parent=?", (path,)), ("parent>=? AND parent<?", (path + b"/", path + b"0"))]


def _signed(number: int) -> int:
    """SQLite's integers are signed; inode and device numbers may use all 64 bits."""
    return number - (1 << 64) if number >= 1 << 63 else number


def _known(root: int, path: bytes, row: Sequence[Any]) -> Known:
    kind, mode, uid, gid, size, mtime_ns, ctime_ns, dev, ino, nlink, rdev, target, xattrs, digest, told_ns = row
    return Known(
        root,
        path,
        FileKind(kind),
        mode,
        uid,
        gid,
        size,
        mtime_ns,
        ctime_ns,
        dev % (1 << 64),
        ino % (1 << 64),
        nlink,
        rdev % (1 << 64),
        target,
        _xattr_decoder.decode(xattrs) if xattrs else (),
        digest,
        told_ns,
    )
