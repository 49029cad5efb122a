"""Find out what a transaction would do to a group's files, before it is applied: what the brake judges by."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from farshore.dbm.messages import (
    Copy,
    Link,
    MakeDir,
    MakeNode,
    MakeSymlink,
    Move,
    Operation,
    Patch,
    Put,
    Remove,
    SetMeta,
)
from farshore.dbm.replica.brake import MOST_MARKS, Change
from farshore.dbm.replica.contents import LEAST, Content, Inline, Opened, Outcome, compare, looks_random, sample
from farshore.dbm.replica.paths import PREFIX, Handles, open_regular
from farshore.errors import UnsafePath

#: Contents of each kind that are looked at in one transaction; the others count as most of these did.
MOST_SAMPLES = 256
#: A rewritten file of which less is left counts as lost.
KEPT_LEAST = 0.5
#: What every ext filesystem has in its root: one that holds nothing else is empty.
_EMPTY = (b"lost+found",)

#: The content that a Patch, a Copy, or a Put without its data brings, None when it cannot be read; it is closed here.
After = Callable[[Operation], Content | None]


def mark(root: int, path: bytes) -> int:
    """A number for a path: a keyed hash, for this process only."""
    return hash(b"%d/%b" % (root, path)) & (1 << 63) - 1


class Sight(Protocol):
    """How the replica's trees are looked at; nothing outside of them is ever reached."""

    def look(self, root: int, path: bytes) -> os.stat_result | None:
        """What is at ``path``, as lstat tells; None for nothing."""
        ...

    def names(self, root: int) -> Iterator[bytes]:
        """The names in the root itself, without ours."""
        ...

    def files_below(self, root: int, path: bytes) -> Iterator[tuple[bytes, int]]:
        """Path and size of everything but directories below a directory."""
        ...

    def content(self, root: int, path: bytes) -> Content | None:
        """The content of a regular file; None when it cannot be read."""
        ...


class TreeSight:
    """Looks at the trees below ``roots``; ``end`` gives back its directory handles, as ``Tree.end`` does."""

    def __init__(self, roots: Sequence[bytes]) -> None:
        self._handles = [Handles(root, widening=False) for root in roots]

    def end(self) -> None:
        """A transaction ends: directories may be moved now."""
        for handles in self._handles:
            handles.forget()

    def look(self, root: int, path: bytes) -> os.stat_result | None:
        """See ``Sight``."""
        try:
            parent, name = self._handles[root].parent(path)
            return os.stat(name, dir_fd=parent, follow_symlinks=False)
        except (OSError, UnsafePath):
            return None

    def names(self, root: int) -> Iterator[bytes]:
        """See ``Sight``."""
        with contextlib.suppress(OSError), os.scandir(self._handles[root].directory(b"")) as entries:
            for entry in entries:
                name = os.fsencode(entry.name)
                if not name.startswith(PREFIX):
                    yield name

    def files_below(self, root: int, path: bytes) -> Iterator[tuple[bytes, int]]:
        """See ``Sight``."""
        pending = [path]
        while pending:
            directory = pending.pop()
            prefix = directory + b"/" if directory else b""
            found: list[tuple[bytes, int]] = []
            # What cannot be read cannot be counted; whether it can be removed is for others to find out.
            with (
                contextlib.suppress(OSError, UnsafePath),
                os.scandir(self._handles[root].directory(directory)) as entries,
            ):
                for entry in entries:
                    name = os.fsencode(entry.name)
                    if name.startswith(PREFIX):
                        continue
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(prefix + name)
                    else:
                        found.append((prefix + name, entry.stat(follow_symlinks=False).st_size))
            yield from found

    def content(self, root: int, path: bytes) -> Content | None:
        """See ``Sight``."""
        try:
            handle = open_regular(self._handles[root], path)
        except (OSError, UnsafePath):
            return None
        return None if handle is None else Opened(handle)


def count(sight: Sight, roots: int) -> tuple[int, int]:
    """How many files the trees hold, and how many bytes: what ``Brake.note_total`` is told."""
    files = size = 0
    for root in range(roots):
        top = sight.look(root, b"")
        if top is None:
            continue
        if not stat.S_ISDIR(top.st_mode):
            files, size = files + 1, size + top.st_size
            continue
        for _, each in sight.files_below(root, b""):
            files, size = files + 1, size + each
    return files, size


def describe(operations: Iterable[Operation], sight: Sight, after: After) -> Change:
    """What ``operations`` would do, in this order, to the trees as they are now."""
    description = _Description(sight, after)
    for operation in operations:
        description.take(operation)
    return description.change()


@dataclass(frozen=True, slots=True)
class _Thing:
    """What is at a path at some moment of the transaction.

    ``origin``: where it lay before the transaction; None for what the transaction brings.
    """

    directory: bool
    regular: bool
    size: int
    origin: bytes | None


class _Majority:
    """Says of what is beyond MOST_SAMPLES what was true of most that was looked at."""

    def __init__(self) -> None:
        self._asked = self._true = 0

    def ask(self, look: Callable[[], bool]) -> bool:
        if self._asked >= MOST_SAMPLES:
            return self._true * 2 > self._asked
        self._asked += 1
        answer = look()
        self._true += answer
        return answer


class _Description:
    """A transaction as far as it was taken in: the trees with it are those on the disk, overlaid with ``_now``."""

    def __init__(self, sight: Sight, after: After) -> None:
        self._sight = sight
        self._after = after
        #: What the transaction has made of a path; None: nothing is there.
        self._now: dict[tuple[int, bytes], _Thing | None] = {}
        #: Roots in which a name of the root itself went away.
        self._thinned: set[int] = set()
        self._added: dict[int, None] = {}
        self._rewritten: dict[int, None] = {}
        self._removed: dict[int, None] = {}
        self._turned: dict[int, None] = {}
        self._renamed: list[tuple[int, int]] = []
        self._plain_removed: list[tuple[int, int]] = []
        self._random_added: list[tuple[int, int]] = []
        self._edited = self._removed_unnamed = 0
        self._files = self._bytes = 0
        self._added_bytes = self._rewritten_bytes = self._removed_bytes = 0
        self._plain = _Majority()
        self._random = _Majority()
        self._compared = 0
        self._compared_lost = 0
        self._compared_turned = 0

    def take(self, operation: Operation) -> None:
        """One more operation; what it says is not checked here, whoever applies it does."""
        root, path = operation.root, operation.path
        match operation:
            case SetMeta():
                pass
            case MakeDir():
                there = self._at(root, path)
                if there is None or not there.directory:
                    self._take_away(root, path, there)
                    self._now[root, path] = _Thing(True, False, 0, None)
            case Put(data=data) if data:
                self._place(root, path, Inline(data))
            case Put() | Patch() | Copy():
                # A Put whose content was staged has lost it.
                self._place(root, path, self._after(operation))
            case Link(to=to):
                target = self._at(root, to)
                content = self._content(root, target)
                self._place(root, path, content, size=target.size if target else 0)
            case MakeSymlink() | MakeNode():
                self._put_other(root, path)
            case Move(to=to):
                self._move(root, path, to)
            case Remove():
                self._take_away(root, path, self._at(root, path))
                self._now[root, path] = None

    def change(self) -> Change:
        """All of it."""
        return Change(
            added=tuple(self._added),
            rewritten=tuple(self._rewritten),
            edited=self._edited,
            removed=tuple(self._removed),
            removed_unnamed=self._removed_unnamed,
            renamed=tuple(self._renamed),
            grown_files=self._files,
            grown_bytes=self._bytes,
            added_bytes=self._added_bytes,
            rewritten_bytes=self._rewritten_bytes,
            removed_bytes=self._removed_bytes,
            turned=tuple(self._turned),
            plain_removed=tuple(self._plain_removed),
            random_added=tuple(self._random_added),
            emptied=tuple(root for root in sorted(self._thinned) if self._is_empty(root)),
        )

    # --- what is where

    def _at(self, root: int, path: bytes) -> _Thing | None:
        if not self._now:
            return self._on_disk(root, path)
        at = path
        while (root, at) not in self._now:
            if not at:
                return self._on_disk(root, path)
            at = at.rpartition(b"/")[0]
        thing = self._now[root, at]
        if at == path or thing is None:
            return thing
        if not thing.directory or thing.origin is None:
            return None
        return self._on_disk(root, thing.origin + path[len(at) :] if at else path)

    def _on_disk(self, root: int, path: bytes) -> _Thing | None:
        status = self._sight.look(root, path)
        if status is None:
            return None
        mode = status.st_mode
        return _Thing(stat.S_ISDIR(mode), stat.S_ISREG(mode), status.st_size, path)

    def _below(self, root: int, path: bytes, directory: _Thing) -> Iterator[_Thing]:
        """Everything but directories below ``path``, where ``directory`` is."""
        origin = directory.origin
        overlaid = {at: thing for (r, at), thing in self._now.items() if r == root and _is_below(at, path)}
        if origin is not None:
            for found, size in self._sight.files_below(root, origin):
                at = path + found[len(origin) :] if origin else _join(path, found)
                if not overlaid or not _hidden(at, path, overlaid):
                    yield _Thing(False, True, size, found)
        for at, thing in overlaid.items():
            if thing is None or _hidden(at.rpartition(b"/")[0], path, overlaid):
                continue
            if not thing.directory:
                yield thing
            elif thing.origin is not None:
                for found, size in self._sight.files_below(root, thing.origin):
                    if not _hidden(at + found[len(thing.origin) :], at, overlaid):
                        yield _Thing(False, True, size, found)

    def _is_empty(self, root: int) -> bool:
        """Whether the root held something, and nothing is left."""
        held = False
        replaced = (root, b"") in self._now  # by a file
        for name in self._sight.names(root):
            if name in _EMPTY:
                continue
            held = True
            if not replaced and self._now.get((root, name), _STAYS) is not None:
                return False
        names = {at for (r, at), thing in self._now.items() if r == root and thing is not None and b"/" not in at}
        return held and not names - {b"", *_EMPTY}

    # --- what happens

    def _place(self, root: int, path: bytes, content: Content | None, *, size: int = 0) -> None:
        """A file with this content comes to ``path``."""
        try:
            there = self._at(root, path)
            size = content.size if content is not None else size
            if there is None or there.directory:
                self._take_away(root, path, there)
                self._add(root, path, content, size)
            else:
                self._replace(root, path, there, content, size)
            self._now[root, path] = _Thing(False, True, size, None)
        finally:
            if content is not None:
                content.close()

    def _add(self, root: int, path: bytes, content: Content | None, size: int) -> None:
        number = mark(root, path)
        self._added[number] = None
        self._added_bytes += size
        self._files += 1
        self._bytes += size
        if content is not None and size >= LEAST and self._random.ask(lambda: _looks_random(content)):
            self._random_added.append((mark(root, path.rpartition(b"/")[0]), number))

    def _replace(self, root: int, path: bytes, there: _Thing, content: Content | None, size: int) -> None:
        self._bytes += size - there.size
        if there.origin is None:
            return  # the transaction brought it itself
        self._rewritten_bytes += size
        if not there.regular or not there.size:
            self._edited += 1
            return
        number = mark(root, there.origin)
        lost, turned = self._compare(root, there, content)
        if lost:
            self._rewritten[number] = None
        else:
            self._edited += 1
        if turned:
            self._turned[number] = None

    def _compare(self, root: int, there: _Thing, content: Content | None) -> tuple[bool, bool]:
        """Whether a content is lost to ``content``, and whether it turned random."""
        if self._compared >= MOST_SAMPLES:
            return self._compared_lost * 2 > self._compared, self._compared_turned * 2 > self._compared
        outcome = self._outcome(root, there, content)
        lost = outcome.kept < KEPT_LEAST
        self._compared += 1
        self._compared_lost += lost
        self._compared_turned += outcome.turned
        return lost, outcome.turned

    def _outcome(self, root: int, there: _Thing, content: Content | None) -> Outcome:
        before = self._content(root, there)
        if before is None or content is None:
            return Outcome(0.0, False)
        with contextlib.closing(before):
            try:
                return compare(before, content)
            except OSError:
                return Outcome(0.0, False)

    def _put_other(self, root: int, path: bytes) -> None:
        there = self._at(root, path)
        if there is None or there.directory:
            self._take_away(root, path, there)
            self._added[mark(root, path)] = None
            self._files += 1
        elif there.origin is not None:
            self._bytes -= there.size
            if there.regular and there.size:
                self._rewritten[mark(root, there.origin)] = None
            else:
                self._edited += 1
        self._now[root, path] = _Thing(False, False, 0, None)

    def _move(self, root: int, path: bytes, to: bytes) -> None:
        thing, target = self._at(root, path), self._at(root, to)
        if thing is None:
            return
        if target is not None and not target.directory and not thing.directory:
            # Many programs save a file by writing a new one and renaming it: what counts is what is in it.
            self._files -= 1
            content = self._content(root, thing)
            try:
                self._replace(root, to, target, content, thing.size)
            finally:
                if content is not None:
                    content.close()
            self._bytes -= thing.size
        else:
            self._take_away(root, to, target)
            if not thing.directory:
                self._rename(root, path, to, thing)
        if b"/" not in path:
            self._thinned.add(root)
        if thing.directory:
            self._move_below(root, path, to)
        self._now[root, path] = None
        self._now[root, to] = thing

    def _rename(self, root: int, path: bytes, to: bytes, thing: _Thing) -> None:
        new = mark(root, to)
        if thing.origin is not None:
            self._renamed.append((mark(root, thing.origin), new))
        elif self._added.pop(mark(root, path), self) is None:
            self._added[new] = None

    def _move_below(self, root: int, path: bytes, to: bytes) -> None:
        """What the transaction has changed below a directory moves with it."""
        for key in [key for key in self._now if key[0] == root and _is_below(key[1], path)]:
            self._now[root, to + key[1][len(path) :]] = self._now.pop(key)

    def _take_away(self, root: int, path: bytes, thing: _Thing | None) -> None:
        """What is at ``path`` is lost."""
        if thing is None:
            return
        if b"/" not in path:
            self._thinned.add(root)
        if not thing.directory:
            self._remove(root, path, thing)
            return
        for each in list(self._below(root, path, thing)):
            self._remove(root, path, each, apart=False)
        for key in [key for key in self._now if key[0] == root and _is_below(key[1], path)]:
            del self._now[key]

    def _remove(self, root: int, path: bytes, thing: _Thing, *, apart: bool = True) -> None:
        """A file is lost; ``apart``: by itself, not with its directory."""
        self._files -= 1
        self._bytes -= thing.size
        if thing.origin is None:
            if apart:
                self._added.pop(mark(root, path), None)
            return
        self._removed_bytes += thing.size
        number = mark(root, thing.origin)
        if len(self._removed) >= MOST_MARKS:
            self._removed_unnamed += 1
            return
        self._removed[number] = None
        if apart and thing.regular and thing.size >= LEAST and self._plain.ask(lambda: self._is_plain(root, thing)):
            self._plain_removed.append((mark(root, path.rpartition(b"/")[0]), number))

    def _is_plain(self, root: int, thing: _Thing) -> bool:
        content = self._content(root, thing)
        if content is None:
            return False
        with contextlib.closing(content):
            return not _looks_random(content)

    def _content(self, root: int, thing: _Thing | None) -> Content | None:
        if thing is None or thing.origin is None or not thing.regular:
            return None
        return self._sight.content(root, thing.origin)


_STAYS = _Thing(False, False, 0, None)


def _looks_random(content: Content) -> bool:
    try:
        return looks_random(sample(content))
    except OSError:
        return False


def _join(directory: bytes, path: bytes) -> bytes:
    return directory + b"/" + path if directory else path


def _is_below(path: bytes, directory: bytes) -> bool:
    return path.startswith(directory + b"/") if directory else bool(path)


def _hidden(path: bytes, top: bytes, overlaid: dict[bytes, _Thing | None]) -> bool:
    """Whether ``path`` or a directory between it and ``top`` is not what the disk has there."""
    while path != top:
        if path in overlaid:
            return True
        if not path:
            return False
        path = path.rpartition(b"/")[0]
    return False
