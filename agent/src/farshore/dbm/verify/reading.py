"""Reading all the contents of a tree for their digests, without being in anybody's way.

The reader takes no more bytes in a second than it may, asks the kernel for the disk only when nobody else does, and
leaves the page cache as it found it. What it has read for one verification it remembers on disk, so that an
interruption costs nothing that was read.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import os
import platform
import sqlite3
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path

import blake3

from farshore.dbm.reading import CheckedReader
from farshore.dbm.replica import paths
from farshore.dbm.replica.intake import Interrupted
from farshore.fmm import scanner
from farshore.fmm.types import Observed, Root

_READ = 1 << 20
#: Seconds of work after which there is a rest, and of the longest one.
_WORK_SECONDS = 0.005
_MOST_REST = 0.05
#: What was found out is written down after so many seconds or rows.
_SAVE_SECONDS = 5.0
_SAVE_ROWS = 10_000
_IDENTITY = struct.Struct(">QQqqQ")
_VERSION = 1
_SCHEMA = f"""
CREATE TABLE IF NOT EXISTS run (id BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS contents (
  root INTEGER NOT NULL, path BLOB NOT NULL, identity BLOB NOT NULL, digest BLOB NOT NULL,
  PRIMARY KEY (root, path)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS directories (
  root INTEGER NOT NULL, path BLOB NOT NULL, digest BLOB NOT NULL, PRIMARY KEY (root, path)) WITHOUT ROWID;
PRAGMA user_version={_VERSION};
"""
#: ioprio_set(2): its number, for this thread, the class in which the disk is given to who waits for it alone.
_IOPRIO_SET = {"x86_64": 251, "aarch64": 30}
_THIS_THREAD = (1, 0)
_IDLE = 3 << 13


def be_idle() -> None:
    """Have this thread's reads wait for everybody else's, where the kernel's scheduler can do that.

    The processor's priority is left alone: a thread that waits for it while it holds the interpreter's lock would
    hold up all others.
    """
    number = _IOPRIO_SET.get(platform.machine())
    if number is not None:
        ctypes.CDLL(None).syscall(number, *_THIS_THREAD, _IDLE)


class Budget:
    """Lets ``rate`` bytes/s be read on average, and half of the time be worked; 0: any.

    Every method raises Interrupted once ``stopped`` is set.
    """

    def __init__(self, rate: float, stopped: threading.Event, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate = rate
        self._stopped = stopped
        self._clock = clock
        self._free_at = self._working_since = clock()

    def check(self) -> None:
        """Raises Interrupted when the reading is not wanted any more."""
        if self._stopped.is_set():
            raise Interrupted

    def spend(self, count: int) -> None:
        """So many bytes were read: wait until the next may be."""
        if self._rate > 0:
            now = self._clock()
            self._free_at = max(self._free_at, now) + count / self._rate
            self._stopped.wait(self._free_at - now)
            self._working_since = self._clock()
        self.check()

    def breathe(self) -> None:
        """A name was looked at: rest as long as was worked, so that the interpreter's lock is free for others."""
        if self._rate > 0:
            worked = self._clock() - self._working_since
            if worked >= _WORK_SECONDS:
                self._stopped.wait(min(worked, _MOST_REST))
                self._working_since = self._clock()
        self.check()


class Store:
    """What was found out for one verification, the digests of contents and of directories. For one thread.

    It can be lost at any time, which costs reading again; a damaged file is one that was lost.
    """

    def __init__(self, path: Path, run: bytes) -> None:
        try:
            self._db = self._open(path, run)
        except sqlite3.DatabaseError:
            forget(path)
            self._db = self._open(path, run)
        self._saved_at = time.monotonic()
        self._rows = 0

    @staticmethod
    def _open(path: Path, run: bytes) -> sqlite3.Connection:
        db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        try:
            db.execute("PRAGMA journal_mode=WAL")
            db.execute("PRAGMA synchronous=OFF")
            if db.execute("PRAGMA user_version").fetchone()[0] not in (0, _VERSION):
                raise sqlite3.DatabaseError("another version")
            db.executescript(_SCHEMA)
            row = db.execute("SELECT id FROM run").fetchone()
            if row is None or row[0] != run:
                for table in ("run", "contents", "directories"):
                    db.execute(f"DELETE FROM {table}")  # noqa: S608 - the names stand here
                db.execute("INSERT INTO run VALUES (?)", (run,))
            db.execute("BEGIN")
        except BaseException:
            db.close()
            raise
        return db

    def close(self) -> None:
        """Keep what was found out, and close the file."""
        with contextlib.suppress(sqlite3.Error):
            self._db.execute("COMMIT")
        self._db.close()

    def content(self, root: int, path: bytes, identity: bytes) -> bytes | None:
        """The digest of a file's content, if it was read in just this state."""
        row = self._db.execute(
            "SELECT digest FROM contents WHERE root=? AND path=? AND identity=?", (root, path, identity)
        ).fetchone()
        return bytes(row[0]) if row else None

    def set_content(self, root: int, path: bytes, identity: bytes, digest: bytes) -> None:
        """Remember the digest of a file's content."""
        self._db.execute("INSERT OR REPLACE INTO contents VALUES (?,?,?,?)", (root, path, identity, digest))
        self._saved()

    def below(self, root: int, path: bytes) -> bytes | None:
        """The digest of all below a directory, as it was when that was last gone over."""
        row = self._db.execute("SELECT digest FROM directories WHERE root=? AND path=?", (root, path)).fetchone()
        return bytes(row[0]) if row else None

    def set_below(self, root: int, path: bytes, digest: bytes) -> None:
        """Remember the digest of all below a directory."""
        self._db.execute("INSERT OR REPLACE INTO directories VALUES (?,?,?)", (root, path, digest))
        self._saved()

    def _saved(self) -> None:
        self._rows += 1
        if self._rows >= _SAVE_ROWS or time.monotonic() - self._saved_at > _SAVE_SECONDS:
            self._db.execute("COMMIT")
            self._db.execute("BEGIN")
            self._rows = 0
            self._saved_at = time.monotonic()


def forget(path: Path) -> None:
    """Remove a store's file."""
    for suffix in ("", "-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)


class ContentReader:
    """Gives digests of contents, from the store where the file is what it was when it was read.

    ``spare_cache``: what is in the page cache serves others and stays there; otherwise it is dropped before a file is
    read, so that it is the disk that answers. For one thread, but for ``read``, the bytes that were read so far.
    """

    def __init__(self, roots: list[Root], store: Store, budget: Budget, spare_cache: bool) -> None:
        self._roots = roots
        self._store = store
        self._budget = budget
        self._spare_cache = spare_cache
        self.read = 0
        #: Called now and then while contents are read.
        self.on_step: Callable[[], None] = budget.check

    def breathe(self) -> None:
        """See Budget."""
        self._budget.breathe()

    def digest(self, seen: Observed, opened: io.FileIO | None = None) -> bytes | None:
        """The BLAKE3-256 of the file that was ``seen``; None when it is another by now, or changed meanwhile.

        ``opened`` is that file, and is closed; that it was given another name, or none, since it was opened is no
        change. Raises OSError when it cannot be read, and Interrupted.
        """
        known = self._store.content(seen.root, seen.path, identity(seen))
        if known is not None:
            if opened is not None:
                opened.close()
            return known
        self._budget.check()
        moment = _content_moment if opened is not None else _moment
        if opened is None:
            try:
                opened = open_to_read(self._roots[seen.root], seen.path)
            except OSError as error:
                if error.errno in scanner.ABSENT:
                    return None
                raise
        with opened as file:
            handle = file.fileno()
            before = os.fstat(handle)
            if (before.st_dev, before.st_ino, before.st_size, before.st_mtime_ns) != (
                seen.dev,
                seen.ino,
                seen.size,
                seen.mtime_ns,
            ):
                return None
            if moment is _moment and before.st_ctime_ns != seen.ctime_ns:
                return None
            length, digest = self._read(file, before)
            after = os.fstat(handle)
        if length != seen.size or moment(after) != moment(before):
            return None
        self._store.set_content(seen.root, seen.path, identity(seen), digest)
        return digest

    def _read(self, file: io.FileIO, status: os.stat_result) -> tuple[int, bytes]:
        handle = file.fileno()
        drop = not self._spare_cache or not _is_cached(handle)
        if not self._spare_cache:
            _drop_cache(handle)
        reader = CheckedReader(file, self._budget.check)
        hasher = blake3.blake3()
        length = 0
        # Holes of sparse files cost no reading.
        on_disk = status.st_blocks * 512
        while block := reader.read(_READ):
            hasher.update(block)
            length += len(block)
            cost = min(len(block), on_disk)
            on_disk -= cost
            self.read += cost
            self._budget.spend(cost)
            self.on_step()
        if drop:
            _drop_cache(handle)
        return length, hasher.digest()


def _moment(status: os.stat_result) -> tuple[int, ...]:
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _content_moment(status: os.stat_result) -> tuple[int, ...]:
    return status.st_size, status.st_mtime_ns


def open_to_read(root: Root, path: bytes) -> io.FileIO:
    """Open a file below a root; raises OSError and UnsafePath."""
    return io.FileIO(scanner.open_file_beneath(root.path, paths.check(path)))


def identity(seen: Observed) -> bytes:
    """What tells one state of a file from all others, as far as lstat can."""
    return _IDENTITY.pack(seen.dev, seen.ino, seen.size, seen.mtime_ns % (1 << 63), seen.ctime_ns % (1 << 64))


def _is_cached(handle: int) -> bool:
    """Whether the beginning of a file is in memory."""
    try:
        os.preadv(handle, [bytearray(1)], 0, os.RWF_NOWAIT)
    except OSError:
        return False
    return True


def _drop_cache(handle: int) -> None:
    with contextlib.suppress(OSError):
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
