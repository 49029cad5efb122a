"""Put right what a power cut took of small contents: their names were written back, their bytes were not.

Small contents are written into the tree without being synced one by one; the journal has them until the tree is synced.
So after a start it is followed where each of them has come to since, by moves, further names and into the history, and
what is found there is compared. Only bytes that are missing or zero are written: anything else is not ours to undo.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable, Iterator, Sequence

from farshore.dbm.messages import Copy, Link, MakeNode, MakeSymlink, Meta, Move, Operation, Patch, Put
from farshore.dbm.replica import metadata
from farshore.dbm.replica.paths import Handles, open_regular
from farshore.dbm.replica.stage import Stage
from farshore.dbm.replica.tree import Tree, read_meta
from farshore.dbm.replica.undo import Kept, Todo
from farshore.errors import UnsafePath
from farshore.log import Log

_log = Log(__name__)
#: The least that a filesystem writes at a time.
_PAGE = 512


#: Names in a directory: of what was put there since the mark, by the transaction and the operation that it came with,
#: and of directories that have such.
_Names = dict[bytes, "tuple[int, int] | _Names"]


class Repair:
    """Follows the operations that were applied after the mark, in their order, and then puts contents right.

    ``read`` gives the operations of a transaction.
    """

    def __init__(
        self, trees: Sequence[Tree], stages: Sequence[Stage], read: Callable[[int], Sequence[Operation]]
    ) -> None:
        self._trees = trees
        self._stages = stages
        self._read = read
        #: Where contents are, by root: in its tree, and in what its stage keeps. Moving a directory is one step.
        self._placed: list[_Names] = [{} for _ in trees]
        self._kept: list[_Names] = [{} for _ in trees]
        self._transaction: tuple[int, Sequence[Operation]] = (0, ())
        self._clock = metadata.Clock()

    def follow(self, todo: Todo) -> None:
        """``todo`` was carried out; one that was left out is as good as unknown, as what it says is not found."""
        operation = todo.operation
        path, placed, kept = operation.path, self._placed[operation.root], self._kept[operation.root]
        for entry in todo.undo:
            if isinstance(entry, Kept):
                _put(kept, entry.folder + b"/" + entry.name, _take(placed, entry.path))
        match operation:
            case Put():
                _put(placed, path, (todo.seq, todo.number))
            case Patch() | Copy() | MakeSymlink() | MakeNode():
                _take(placed, path)
            case Move(to=to):
                _put(placed, to, _take(placed, path))
            case Link(to=to):
                _put(placed, path, _get(placed, to))

    def run(self) -> int:
        """Returns how many files were put right; raises OSError, StateError."""
        count = 0
        for root, (tree, stage) in enumerate(zip(self._trees, self._stages, strict=True)):
            if self._placed[root]:
                count += self._put_all_right(tree.root, self._placed[root])
            if self._kept[root]:
                count += self._put_all_right(stage.place(), self._kept[root])
        if count:
            _log.warning("contents that a power cut took were written anew", files=count)
        return count

    def _put_all_right(self, top: bytes, names: _Names) -> int:
        count = 0
        handles = Handles(top)
        try:
            for path, (seq, number) in _all(names):
                if self._transaction[0] != seq:
                    self._transaction = seq, self._read(seq)
                operation = self._transaction[1][number]
                assert isinstance(operation, Put)
                count += self._put_right(handles, path, operation.data)
        finally:
            handles.restore()
            handles.forget()
        return count

    def _put_right(self, handles: Handles, path: bytes, data: bytes) -> bool:
        try:
            handle = open_regular(handles, path)
        except UnsafePath:
            return False
        if handle is None:
            return False
        try:
            there = os.pread(handle, len(data) + 1, 0)
            if there == data or not _is_lost(there, data):
                return False
            parent, name = handles.parent(path)
            self._write(handle, data, read_meta(parent, name, os.fstat(handle)))
        finally:
            os.close(handle)
        return True

    def _write(self, handle: int, data: bytes, meta: Meta) -> None:
        where = f"/proc/self/fd/{handle}"
        if os.geteuid() != 0:
            os.chmod(where, meta.mode | stat.S_IWUSR)
        writing = os.open(where, os.O_WRONLY | os.O_CLOEXEC)
        try:
            done = 0
            while done < len(data):
                done += os.pwrite(writing, data[done:], done)
            # Writing takes setuid away from who is not root, and changes the time.
            metadata.give(writing, meta, lambda _: None, self._clock, owner=None, mode=None, bare=False)
        finally:
            with contextlib.suppress(OSError):
                os.close(writing)


def _get(names: _Names, path: bytes) -> tuple[int, int] | _Names | None:
    """What is at ``path``, None when nothing is known there."""
    found: tuple[int, int] | _Names | None = names
    for name in path.split(b"/"):
        if not isinstance(found, dict):
            return None
        found = found.get(name)
    return found


def _take(names: _Names, path: bytes) -> tuple[int, int] | _Names | None:
    """As ``_get``; nothing is there afterwards."""
    above, _, name = path.rpartition(b"/")
    parent = _get(names, above) if above else names
    return parent.pop(name, None) if isinstance(parent, dict) else None


def _put(names: _Names, path: bytes, what: tuple[int, int] | _Names | None) -> None:
    if what is None:
        _take(names, path)
        return
    *above, last = path.split(b"/")
    for name in above:
        below = names.get(name)
        if not isinstance(below, dict):
            below = names[name] = {}
        names = below
    names[last] = what


def _all(names: _Names) -> Iterator[tuple[bytes, tuple[int, int]]]:
    """All contents, with their paths."""
    stack = [(b"", names)]
    while stack:
        base, names = stack.pop()
        for name, what in names.items():
            if isinstance(what, dict):
                stack.append((base + name + b"/", what))
            else:
                yield base + name, what


def _is_lost(there: bytes, data: bytes) -> bool:
    """Whether ``there`` is ``data`` of which something was not written: it ends early, or pages of it are zero."""
    if len(there) > len(data):
        return False
    for at in range(0, len(there), _PAGE):
        page = there[at : at + _PAGE]
        if page != data[at : at + len(page)] and page.strip(b"\0"):
            return False
    return True
