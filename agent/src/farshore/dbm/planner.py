"""From dirty paths to operations: the state of a path now, against what the index says the replica has.

Hints only say where to look. What is sent follows from the difference between disk and index alone, so a hint
that is lost, doubled or out of order costs time and never correctness. Runs in the source's worker thread.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Generator, Iterable
from dataclasses import dataclass, field, replace
from io import FileIO

import blake3

from farshore import delta
from farshore.dbm import wire
from farshore.dbm.index import Index, Known, clamp_time, parent_of
from farshore.dbm.messages import (
    INLINE_MAX,
    Chunk,
    FromSource,
    Link,
    MakeDir,
    MakeNode,
    MakeSymlink,
    Meta,
    Move,
    Patch,
    Put,
    Remove,
    SetMeta,
    WantSignature,
)
from farshore.dbm.replica import paths
from farshore.errors import FarshoreError, UnsafePath
from farshore.fmm import scanner
from farshore.fmm.dirty import Dirty
from farshore.fmm.patterns import Filter
from farshore.fmm.types import FileKind, Hint, Kind, Observed, Root

#: A transaction is closed after so many operations or bytes of content.
MAX_OPERATIONS = 1000
MAX_BYTES = 16 << 20
#: It is closed after so much time of looking, too: what changes now must not wait for the end of a long walk.
LOOK_SECONDS = 0.25
#: The longest path that a replica takes.
MAX_PATH = 4096
#: Two changes within one tick of the kernel's clock leave equal times (10 ms at HZ=100): who changed so shortly
#: before being read may change again unseen by lstat, as in git's "racy" index entries.
_RACY_NS = 20_000_000
_READ = 1 << 20
#: Extended attributes beyond this would not fit into a frame together with the rest of a message.
_MAX_XATTRS = wire.MAX_FRAME - INLINE_MAX - 4 * MAX_PATH
_XATTR_OVERHEAD = 16
_CONTENT = Kind.MODIFIED | Kind.CREATED | Kind.MOVED_TO
#: What the planner yields goes to the replica; a WantSignature is answered by the bytes sent into the generator.
Messages = Generator[FromSource, bytes | None, None]


class SourceUnreadable(FarshoreError):
    """{0!r} cannot be read any further: {1}"""


class _Unobservable(Exception):
    """An error hides whether a path exists. It is noted as a problem; whoever wanted to know gives the path up."""


class _NextTransaction(Exception):
    """A delta needs a base that this transaction makes: bases are opened before a transaction is applied."""


@dataclass
class Batch:
    """Dirty paths taken together, and what is left to do for them."""

    items: list[Dirty]
    walks: list[tuple[int, bytes]] = field(default_factory=list)
    todo: list[tuple[int, bytes, Kind]] = field(default_factory=list)
    vanished: list[tuple[int, bytes]] = field(default_factory=list)

    def __post_init__(self) -> None:
        # A stack: the last is next, so parents stay before their children.
        self.todo = [(item.root, item.path, item.kind) for item in reversed(self.items)]

    @property
    def finished(self) -> bool:
        """True when nothing is left to do."""
        return not (self.walks or self.todo or self.vanished)


class Planner:
    """Plans the transactions of one group. ``again`` holds hints for what changed while it was read."""

    def __init__(self, index: Index, roots: list[Root]) -> None:
        self._index = index
        self._roots = roots
        self._filters = [Filter(root) for root in roots]
        self._touched: set[tuple[int, bytes]] = set()
        self._remade: set[tuple[int, bytes]] = set()
        self._cut = False
        self._operations = 0
        self._bytes = 0
        self._looked = self._resumed = 0.0
        # Files that failed in the middle of their content, with their ctime then.
        self._unreadable: dict[tuple[int, bytes], int] = {}
        self.again: list[Hint] = []
        #: Roots that are missing, or look as if they were not mounted: what is protected cannot be told from them.
        self.absent_roots: set[int] = set()
        #: Paths that were looked at so far.
        self.looked_at = 0
        #: What the transaction changes on the replica; ``drastic`` when a directory is moved, removed or replaced.
        self.changed: set[tuple[int, bytes]] = set()
        self.drastic = False
        #: What could not be read or told, by root, path and what of it ("root", "state", ...), with the reason.
        self.problems: dict[tuple[int, bytes, str], str] = {}

    def transaction(self, batch: Batch) -> Messages:
        """The operations of the next transaction for ``batch``; none when there is nothing to tell.

        Raises SourceUnreadable when a file fails in the middle of its content: the transaction is lost.
        """
        steps = self._steps(batch)
        answer: bytes | None = None
        self._looked = 0.0
        while True:
            self._resumed = time.monotonic()
            try:
                message = steps.send(answer)
            except StopIteration:
                return
            # The time that whoever takes the message needs is not ours.
            self._looked += time.monotonic() - self._resumed
            answer = yield message

    def _steps(self, batch: Batch) -> Messages:
        self._operations = self._bytes = 0
        self._cut = False
        self._touched.clear()
        self._remade.clear()
        self.changed.clear()
        self.drastic = False
        while not (batch.finished or self._cut or self._operations >= MAX_OPERATIONS or self._bytes >= MAX_BYTES):
            with contextlib.suppress(_Unobservable):
                yield from self._step(batch)
            if self._looked + time.monotonic() - self._resumed >= LOOK_SECONDS:
                break
        yield from self._directories()

    def _step(self, batch: Batch) -> Messages:
        if batch.todo:
            root, path, kind = batch.todo.pop()
            yield from self._look(batch, root, path, kind)
        elif batch.walks:
            self._list(batch, *batch.walks.pop())
        else:
            yield from self._gone(batch, *batch.vanished.pop())

    def doubt(self, paths: Iterable[tuple[int, bytes]]) -> list[Hint]:
        """Of what the replica has at ``paths`` nothing is certain any more, not even that it has nothing there.

        Returns the hints that have them looked at. Belongs to the index's open transaction.
        """
        hints = []
        for root, path in paths:
            known = self._index.get(root, path)
            if known is not None and known.kind is FileKind.DIRECTORY:
                # It is there, as only a drastic transaction would have changed that; no metadata equals this mode.
                self._index.put(replace(known, mode=-1))
                hints.append(Hint(root, path, Kind.ATTRIBUTES))
                continue
            self._index.remove(root, path)
            self._index.put(_unknown(root, path))
            hints.append(Hint(root, path, Kind.RESCAN | Kind.MODIFIED))
        return hints

    # --- where to look

    def _where(self, root: int, path: bytes) -> bytes:
        base = self._roots[root].path
        return base + b"/" + path if path else base

    def _note(self, root: int, path: bytes, what: str, why: str | None) -> None:
        """``why`` keeps ``what`` of the path from being replicated; None when nothing does any more."""
        if why is None:
            self.problems.pop((root, path, what), None)
        else:
            self.problems[root, path, what] = f"{os.fsdecode(self._where(root, path))}: {why}"

    def _forget_problems(self, root: int, path: bytes) -> None:
        """Nothing is at ``path``, so nothing is wrong there or below."""
        for key in [k for k in self.problems if k[0] == root and (k[1] == path or k[1].startswith(path + b"/"))]:
            del self.problems[key]

    def _observe(self, root: int, path: bytes) -> Observed | None:
        """The state of a path as it can be told to the replica, None when nothing is there.

        Raises _Unobservable when neither can be found out.
        """
        try:
            seen = scanner.observe(self._roots[root].path, root, path)
        except OSError as error:
            self._note(root, path, "state", _reason(error))
            if not path:
                self._absent(root, _reason(error))
            raise _Unobservable from error
        self._note(root, path, "state", None)
        if seen is None:
            return None
        size = sum(len(name) + len(value) + _XATTR_OVERHEAD for name, value in seen.xattrs)
        if size > _MAX_XATTRS:
            self._note(root, path, "xattrs", f"its extended attributes are too large to be replicated ({size} bytes)")
            seen = replace(seen, xattrs=())
        else:
            self._note(root, path, "xattrs", None)
        times = (seen.atime_ns, seen.mtime_ns, seen.ctime_ns)
        atime, mtime, ctime = map(clamp_time, times)
        if times != (atime, mtime, ctime):
            seen = replace(seen, atime_ns=atime, mtime_ns=mtime, ctime_ns=ctime)
        return seen

    def _glimpse(self, root: int, path: bytes) -> Observed | None:
        """What is observed at ``path``; None also when that fails."""
        try:
            return self._observe(root, path)
        except _Unobservable:
            return None

    def _list(self, batch: Batch, root: int, path: bytes) -> None:
        """Look at everything in one directory, and at what should be there and is not."""
        try:
            names = [name for name, _ in scanner.list_directory(self._roots[root].path, path, self._filters[root])]
        except (FileNotFoundError, NotADirectoryError):
            batch.vanished.append((root, path))
            return
        except OSError as error:
            self._note(root, path, "entries", _reason(error))
            return
        self._note(root, path, "entries", None)
        prefix = path + b"/" if path else b""
        there = {prefix + name for name in names}
        batch.todo.extend((root, child, Kind.RESCAN) for child in sorted(there, reverse=True))
        for child in self._index.children(root, path):
            if child in there:
                continue
            known = self._index.get(root, child)
            if known and self._filters[root].allows(child, known.kind is FileKind.DIRECTORY):
                batch.vanished.append((root, child))
            else:
                self._index.remove(root, child)

    def _look(self, batch: Batch, root: int, path: bytes, kind: Kind) -> Messages:
        self.looked_at += 1
        if not self._can_name(root, path):
            return
        seen = self._observe(root, path)
        if seen is None:
            batch.vanished.append((root, path))
            return
        if not path:
            if not self._has_root(root):
                return
            self._present(seen)
        if path and not self._filters[root].allows(path, seen.kind is FileKind.DIRECTORY):
            known = self._index.get(root, path)
            if known is not None and self._filters[root].allows(path, known.kind is FileKind.DIRECTORY):
                # What was protected is gone; something that is not took its place.
                yield from self._remove(batch, known)
            return
        yield from self._sync(batch, seen, bool(kind & _CONTENT))
        if Kind.RESCAN in kind and seen.kind is FileKind.DIRECTORY:
            batch.walks.append((root, path))

    def _can_name(self, root: int, path: bytes) -> bool:
        """False for what is too long for the replica: it is a problem, not to be sent."""
        try:
            paths.check(path)
        except UnsafePath:
            longest = max(map(len, path.split(b"/")))
            why = f"path is longer than {MAX_PATH} bytes" if len(path) > MAX_PATH else f"a name has {longest} bytes"
            self._note(root, path, "name", why)
            return False
        return True

    def _absent(self, root: int, why: str) -> None:
        self.absent_roots.add(root)
        self._note(root, b"", "root", why)

    def _present(self, seen: Observed) -> None:
        """A root is there; remember the filesystem that it is on while it is filled."""
        self.absent_roots.discard(seen.root)
        self._note(seen.root, b"", "root", None)
        if seen.kind is FileKind.DIRECTORY and self._device(seen.root) != seen.dev and not self._is_empty(seen.root):
            self._index.set_fact(self._device_key(seen.root), str(seen.dev).encode())

    def _device_key(self, root: int) -> str:
        return f"dev:{self._roots[root].path.hex()}"

    def _device(self, root: int) -> int | None:
        """The filesystem that a root was on when it was last seen filled; None when it never was."""
        fact = self._index.get_fact(self._device_key(root))
        return None if fact is None else int(fact)

    def _is_empty(self, root: int) -> bool:
        try:
            with os.scandir(self._where(root, b"")) as entries:
                return next(entries, None) is None
        except OSError:
            return True

    def _looks_unmounted(self, seen: Observed) -> bool:
        """An empty directory where a filled one of another filesystem was is a fault, not a wish."""
        if seen.kind is not FileKind.DIRECTORY or self._device(seen.root) in (None, seen.dev):
            return False
        return self._is_empty(seen.root)

    def _has_root(self, root: int) -> bool:
        """False when the root itself is missing or unusable: that says nothing about what is wanted below it."""
        seen = self._observe(root, b"")
        if seen is None:
            self._absent(root, "the protected path is missing")
        elif seen.kind is FileKind.SYMLINK:
            self._absent(root, "a symbolic link that leads to no directory; protect what it leads to")
        elif self._looks_unmounted(seen):
            self._absent(root, "empty, and on another filesystem than before; is it not mounted?")
        else:
            return True
        return False

    def _gone(self, batch: Batch, root: int, path: bytes) -> Messages:
        known = self._index.get(root, path)
        seen = self._observe(root, path)
        if seen is not None:
            batch.todo.append((root, path, Kind.RESCAN))
        elif not path:
            # An unmounted or vanished root is a fault here, not a wish to empty the replica.
            self._absent(root, "the protected path is missing")
        elif self._has_root(root):
            self._forget_problems(root, path)
            self._unreadable.pop((root, path), None)
            if known is not None:
                yield from self._remove(batch, known)

    def _remove(self, batch: Batch, known: Known) -> Messages:
        self._look_at_other_names(batch, known)
        yield from self._emit(Remove(known.root, known.path))
        self._index.remove(known.root, known.path)

    def _look_at_other_names(self, batch: Batch, lost: Known) -> None:
        """A name is lost: what was written through it shows under the other names of the file, unannounced."""
        if lost.kind is FileKind.DIRECTORY:
            names = self._index.linked_below(lost.root, lost.path)
        else:
            names = [lost] if lost.kind is FileKind.FILE and lost.nlink > 1 else []
        for name in names:
            for other in self._index.by_inode(name.root, name.dev, name.ino) if name.ino else ():
                if other.path != name.path:
                    batch.todo.append((other.root, other.path, Kind.MODIFIED))

    # --- what to tell

    def _emit(self, message: FromSource, size: int = 0) -> Messages:
        self._operations += 1
        self._bytes += size
        if isinstance(message, (Put, Patch, Link)):
            self._remade.add((message.root, message.path))
        elif isinstance(message, Move):
            self._remade.add((message.root, message.to))
        for path in (getattr(message, "path", None), getattr(message, "to", None)):
            if path is None:
                continue
            root: int = message.root  # type: ignore[union-attr]
            self.changed.add((root, path))
            if isinstance(message, (Move, Remove)):
                known = self._index.get(root, path)
                self.drastic |= known is not None and known.kind is FileKind.DIRECTORY
            parent = parent_of(path)
            if parent is not None:
                self._touched.add((root, parent))
        yield message

    def _directories(self) -> Messages:
        """What was done below them changed the directories' own times on the replica: set them last."""
        for root, path in sorted(self._touched, key=lambda item: item[1].count(b"/"), reverse=True):
            with contextlib.suppress(_Unobservable):
                yield from self._directory_meta(root, path)
        self._touched.clear()

    def _directory_meta(self, root: int, path: bytes) -> Messages:
        known = self._index.get(root, path)
        seen = self._observe(root, path)
        if known is None or seen is None or not known.kind is seen.kind is FileKind.DIRECTORY:
            return
        if not path:
            if not self._has_root(root):
                return
            self._present(seen)
        self.changed.add((root, path))
        yield SetMeta(root, path, _meta(seen))
        self._index.put(_known(seen, None, settled=True))

    def _sync(self, batch: Batch, seen: Observed, force: bool) -> Messages:
        """Make the replica have what was seen."""
        root, path = seen.root, seen.path
        if not (yield from self._parents(batch, root, path)):
            batch.vanished.append((root, path))
            return
        known = self._index.get(root, path)
        if seen.kind is FileKind.SOCKET:
            # A socket lives as long as its server; there is nothing to keep.
            if known is not None:
                yield from self._emit(Remove(root, path))
                self._index.remove(root, path)
            return
        if known is None or known.ino != seen.ino or known.kind != seen.kind:
            if known is not None:
                self._look_at_other_names(batch, known)
            known = (yield from self._moved(batch, seen)) or known
        if known is not None and known.kind is not seen.kind:
            if known.kind is FileKind.DIRECTORY:
                yield from self._emit(Remove(root, path))
            self._index.remove(root, path)
            # What takes its place may turn out to be unreadable; the replica has something there until then.
            self._index.put(_unknown(root, path))
            known = None
        match seen.kind:
            case FileKind.DIRECTORY:
                yield from self._directory(batch, seen, known)
            case FileKind.FILE:
                yield from self._file(batch, seen, known, force)
            case _:
                yield from self._special(seen, known)

    def _parents(self, batch: Batch, root: int, path: bytes) -> Generator[FromSource, bytes | None, bool]:
        """Make sure that the replica has the directory that ``path`` lies in; False when it is gone here."""
        parent = parent_of(path)
        if parent is None:
            return True
        known = self._index.get(root, parent)
        if known is not None and known.kind is FileKind.DIRECTORY:
            return True
        seen = self._observe(root, parent)
        if seen is None or seen.kind is not FileKind.DIRECTORY:
            return False
        yield from self._sync(batch, seen, False)
        return self._index.get(root, parent) is not None

    def _moved(self, batch: Batch, seen: Observed) -> Generator[FromSource, bytes | None, Known | None]:
        """If what was seen stood under another name that is free now, rename it on the replica."""
        root, path = seen.root, seen.path
        if not path or (seen.nlink > 1 and seen.kind is not FileKind.DIRECTORY):
            return None
        for old in self._index.by_inode(root, seen.dev, seen.ino):
            if old.kind is not seen.kind or old.path in (path, b""):
                continue
            if path.startswith(old.path + b"/") or old.path.startswith(path + b"/"):
                continue
            if self._index.longest_below(root, old.path) + len(path) - len(old.path) > MAX_PATH:
                continue
            there = self._glimpse(root, old.path)
            if there is not None and (there.dev, there.ino) == (seen.dev, seen.ino):
                continue
            yield from self._emit(Move(root, old.path, path))
            self._index.move(root, old.path, path)
            batch.vanished.append((root, old.path))
            if seen.kind is FileKind.DIRECTORY:
                batch.walks.append((root, path))
            return self._index.get(root, path)
        return None

    def _directory(self, batch: Batch, seen: Observed, known: Known | None) -> Messages:
        if known is None:
            yield from self._emit(MakeDir(seen.root, seen.path, _meta(seen)))
            batch.walks.append((seen.root, seen.path))
        else:
            if known.ino != seen.ino and known.ino:
                batch.walks.append((seen.root, seen.path))
            if not known.same_meta(seen):
                self._operations += 1
                self._touched.add((seen.root, seen.path))
        self._index.put(_known(seen, None, settled=True))

    def _special(self, seen: Observed, known: Known | None) -> Messages:
        if known is None or known.target != seen.target or known.rdev != seen.rdev:
            if seen.target is not None:
                yield from self._emit(MakeSymlink(seen.root, seen.path, _meta(seen), seen.target))
            else:
                yield from self._emit(MakeNode(seen.root, seen.path, _meta(seen), int(seen.kind), seen.rdev))
        elif not known.same_meta(seen):
            yield from self._emit(SetMeta(seen.root, seen.path, _meta(seen)))
        self._index.put(_known(seen, None, settled=True))

    def _file(self, batch: Batch, seen: Observed, known: Known | None, force: bool) -> Messages:
        if known is not None and known.same_identity(seen) and not force:
            return
        if self._unreadable.get((seen.root, seen.path)) == seen.ctime_ns and not force:
            return
        if known is not None and known.listed_alike(seen) and not force:
            if not known.same_meta(seen):
                yield from self._emit(SetMeta(seen.root, seen.path, _meta(seen)))
            self._index.put(_known(seen, None, settled=True))
            self._disown(seen, [])
            return
        names: list[Known] = []
        if seen.nlink > 1:
            names = self._other_names(seen)
            if names and (known is None or (known.dev, known.ino) != (seen.dev, seen.ino)):
                yield from self._emit(Link(seen.root, seen.path, names[0].path))
                known = replace(names[0], path=seen.path)
                self._index.put(known)
                signature = self._index.get_signature(seen.root, names[0].path)
                self._index.set_signature(seen.root, seen.path, signature)
                if known.same_identity(replace(seen, path=known.path)):
                    return
        try:
            handle = _open(self._where(seen.root, seen.path))
        except FileNotFoundError:
            batch.vanished.append((seen.root, seen.path))
            return
        except OSError as error:
            self._note(seen.root, seen.path, "content", _reason(error))
            return
        started = time.time_ns()
        with os.fdopen(handle, "rb", buffering=0) as source:
            before = os.fstat(handle)
            if (before.st_dev, before.st_ino) != (seen.dev, seen.ino):
                batch.todo.append((seen.root, seen.path, Kind.MODIFIED))
                return
            try:
                entry = yield from self._content(source, seen, known)
            except _NextTransaction:
                self._cut = True
                batch.todo.append((seen.root, seen.path, Kind.MODIFIED))
                return
            except OSError as error:
                # Nothing of it was sent yet, so that only this file stays behind.
                self._cannot_read(seen, error)
                return
            after = os.fstat(handle)
        self._note(seen.root, seen.path, "content", None)
        self._unreadable.pop((seen.root, seen.path), None)
        same = (before.st_mtime_ns, before.st_ctime_ns, before.st_size) == (
            after.st_mtime_ns,
            after.st_ctime_ns,
            after.st_size,
        ) and clamp_time(after.st_ctime_ns) == seen.ctime_ns
        if not same:
            self.again.append(Hint(seen.root, seen.path, Kind.MODIFIED))
        entry = _settle(entry, same and started - seen.ctime_ns > _RACY_NS)
        self._index.put(entry)
        self._disown(seen, names)
        if self._content_sent:
            # New content came under one name, as a new file on the replica; the other names must follow.
            for name in names:
                yield from self._emit(Link(seen.root, name.path, seen.path))
        for name in names:
            self._index.put(replace(entry, path=name.path))
            if self._content_sent:
                signature = self._index.get_signature(seen.root, seen.path)
                self._index.set_signature(seen.root, name.path, signature)

    def _disown(self, seen: Observed, names: list[Known]) -> None:
        """Inode numbers are used again: no other path may seem to be a name of this file on the replica."""
        mine = {seen.path, *(name.path for name in names)}
        for other in self._index.by_inode(seen.root, seen.dev, seen.ino):
            if other.path not in mine:
                self._index.put(replace(other, dev=0, ino=0, ctime_ns=0))

    def _other_names(self, seen: Observed) -> list[Known]:
        """The names of the same file that the replica has and that are still its names here."""
        names = []
        for other in self._index.by_inode(seen.root, seen.dev, seen.ino):
            if other.path == seen.path or other.kind is not FileKind.FILE:
                continue
            there = self._glimpse(seen.root, other.path)
            if there is not None and (there.dev, there.ino) == (seen.dev, seen.ino):
                names.append(other)
        return names

    _content_sent = False

    def _content(
        self, source: FileIO, seen: Observed, known: Known | None
    ) -> Generator[FromSource, bytes | None, Known]:
        """Send what differs of a file's content and metadata; returns what the replica will have.

        Raises OSError when it cannot be read and nothing was sent, SourceUnreadable in the middle of it.
        """
        self._content_sent = False
        root, path = seen.root, seen.path
        if seen.size <= INLINE_MAX:
            data = source.read(INLINE_MAX + 1)
            if len(data) <= INLINE_MAX:
                digest = blake3.blake3(data).digest()
                if not _has(known, seen, len(data), digest):
                    self._content_sent = True
                    yield from self._emit(Put(root, path, _meta(seen), data), len(data))
                    self._index.set_signature(root, path, None)
                elif known is not None and not known.same_meta(seen):
                    yield from self._emit(SetMeta(root, path, _meta(seen)))
                return _known(replace(seen, size=len(data)), digest, settled=True)
            source.seek(0)
        if known is not None and known.size == seen.size and (not known.ctime_ns or known.mtime_ns == seen.mtime_ns):
            digest = _digest(source)
            if _has(known, seen, seen.size, digest):
                if not known.same_meta(seen):
                    yield from self._emit(SetMeta(root, path, _meta(seen)))
                return _known(seen, digest, settled=True)
            source.seek(0)
        elif (root, path) in self._unreadable:
            # It failed once in the middle and took the transaction with it: this time see first whether it can be read.
            _digest(source)
            source.seek(0)
        return (yield from self._patch(source, seen, known))

    def _patch(self, source: FileIO, seen: Observed, known: Known | None) -> Generator[FromSource, bytes | None, Known]:
        root, path = seen.root, seen.path
        base = None
        if known is not None and known.kind is FileKind.FILE and known.size > INLINE_MAX:
            if self._is_remade(root, path):
                raise _NextTransaction
            blob = self._index.get_signature(root, path)
            if blob is None:
                blob = yield WantSignature(root, path)
            base = None if blob is None else delta.Signature.from_bytes(blob)
        self._content_sent = True
        sparse = seen.blocks * 512 < seen.size
        yield from self._emit(Patch(root, path, _meta(seen), base is not None, sparse))
        encoder = delta.Encoder(base)
        try:
            for chunk in encoder.encode(source):
                self._bytes += len(chunk)
                yield Chunk(bytes(chunk), False)
        except OSError as error:
            self._cannot_read(seen, error)
            raise SourceUnreadable(self._where(root, path), error.strerror) from error
        yield Chunk(b"", True)
        assert encoder.signature is not None
        self._index.set_signature(root, path, encoder.signature.to_bytes())
        return _known(replace(seen, size=encoder.length), encoder.digest, settled=True)

    def _cannot_read(self, seen: Observed, error: OSError) -> None:
        """Leave the file alone until a hint, or another ctime, promises better."""
        self._note(seen.root, seen.path, "content", _reason(error))
        self._unreadable[seen.root, seen.path] = seen.ctime_ns

    def _is_remade(self, root: int, path: bytes) -> bool:
        """True when this transaction made, or moved, what is at ``path``."""
        while path:
            if (root, path) in self._remade:
                return True
            path = path.rpartition(b"/")[0]
        return (root, b"") in self._remade


def _reason(error: OSError) -> str:
    return error.strerror or str(error)


def _open(where: bytes) -> int:
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        # Reading must not change the access times that the owner of the file sees.
        return os.open(where, flags | os.O_NOATIME)
    except PermissionError:
        return os.open(where, flags)


def _digest(source: FileIO) -> bytes:
    hasher = blake3.blake3()
    while block := source.read(_READ):
        hasher.update(block)
    return hasher.digest()


def _has(known: Known | None, seen: Observed, size: int, digest: bytes) -> bool:
    return known is not None and known.size == size and known.digest == digest and not _doubtful(known, seen)


def _doubtful(known: Known, seen: Observed) -> bool:
    """A replica's file with several names that was not made from what is seen: it may be linked to what is separate."""
    return known.nlink > 1 and (known.dev, known.ino) != (seen.dev, seen.ino)


def _meta(seen: Observed) -> Meta:
    return Meta(seen.mode, seen.uid, seen.gid, seen.atime_ns, seen.mtime_ns, list(seen.xattrs))


def _settle(entry: Known, settled: bool) -> Known:
    return entry if settled else replace(entry, ctime_ns=0)


def _known(seen: Observed, digest: bytes | None, settled: bool) -> Known:
    return Known(
        seen.root,
        seen.path,
        seen.kind,
        seen.mode,
        seen.uid,
        seen.gid,
        seen.size,
        seen.mtime_ns,
        seen.ctime_ns if settled else 0,
        seen.dev,
        seen.ino,
        seen.nlink,
        seen.rdev,
        seen.target,
        seen.xattrs,
        digest,
    )


def _unknown(root: int, path: bytes) -> Known:
    """An entry that equals nothing: something may be there. Sockets are never on a replica."""
    return Known(root, path, FileKind.SOCKET, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, None, (), None)


def dirty_everything(roots: Iterable[int]) -> list[Hint]:
    """Hints that put every root in doubt."""
    return [Hint(root, b"", Kind.RESCAN) for root in roots]
