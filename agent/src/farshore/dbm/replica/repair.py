"""Put right what a power cut took of small contents: their names were written back, their bytes were not.

Small contents are written into the tree without being synced one by one; the journal has them until the tree is synced.
So after a start it is followed where each of them has come to since, by moves, further names and into the history, and
what is found there is compared. Only bytes that are missing or zero are written: anything else is not ours to undo.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable, Sequence
from typing import NamedTuple

from farshore.dbm.messages import Copy, Link, MakeNode, MakeSymlink, Meta, Move, Operation, Patch, Put
from farshore.dbm.replica import metadata
from farshore.dbm.replica.paths import Handles, open_regular
from farshore.dbm.replica.stage import Stage
from farshore.dbm.replica.tree import Tree, read_meta
from farshore.dbm.replica.undo import Kept, Moved, Todo
from farshore.errors import UnsafePath
from farshore.log import Log

_log = Log(__name__)
_PAGE = 4096


class _Place(NamedTuple):
    """Where something is: in the tree of a root, or, ``kept``, in what its stage keeps."""

    root: int
    kept: bool
    path: bytes


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
        #: The transaction and the operation that each content came with.
        self._contents: dict[_Place, tuple[int, int]] = {}
        self._transaction: tuple[int, Sequence[Operation]] = (0, ())
        self._clock = metadata.Clock()

    def follow(self, todo: Todo) -> None:
        """``todo`` was carried out; one that was left out is as good as unknown, as what it says is not found."""
        operation = todo.operation
        root, path = operation.root, operation.path
        for entry in todo.undo:
            if isinstance(entry, Kept):
                kept = _Place(root, True, entry.folder + b"/" + entry.name)
                self._move(_Place(root, False, entry.path), kept, directory=stat.S_ISDIR(entry.kind))
        match operation:
            case Put():
                self._contents[_Place(root, False, path)] = todo.seq, todo.number
            case Patch() | Copy() | MakeSymlink() | MakeNode():
                self._contents.pop(_Place(root, False, path), None)
            case Move(to=to):
                directory = any(isinstance(entry, Moved) and entry.directory for entry in todo.undo)
                self._move(_Place(root, False, path), _Place(root, False, to), directory=directory)
            case Link(to=to):
                linked = self._contents.get(_Place(root, False, to))
                if linked is None:
                    self._contents.pop(_Place(root, False, path), None)
                else:
                    self._contents[_Place(root, False, path)] = linked

    def _move(self, place: _Place, to: _Place, *, directory: bool) -> None:
        if not directory:
            content = self._contents.pop(place, None)
            if content is not None:
                self._contents[to] = content
            return
        below = place.path + b"/"
        same = place.root, place.kept
        for each in [each for each in self._contents if each[:2] == same and each.path.startswith(below)]:
            self._contents[to._replace(path=to.path + each.path[len(place.path) :])] = self._contents.pop(each)

    def run(self) -> int:
        """Returns how many files were put right; raises OSError, StateError."""
        count = 0
        for place, (seq, number) in self._contents.items():
            if self._transaction[0] != seq:
                self._transaction = seq, self._read(seq)
            operation = self._transaction[1][number]
            assert isinstance(operation, Put)
            if self._put_right(place, operation.data):
                count += 1
        if count:
            _log.warning("contents that a power cut took were written anew", files=count)
        return count

    def _put_right(self, place: _Place, data: bytes) -> bool:
        handles = Handles(self._stages[place.root].place() if place.kept else self._trees[place.root].root)
        try:
            try:
                handle = open_regular(handles, place.path)
            except UnsafePath:
                return False
            if handle is None:
                return False
            try:
                there = os.pread(handle, len(data) + 1, 0)
                if there == data or not _is_lost(there, data):
                    return False
                parent, name = handles.parent(place.path)
                meta = read_meta(parent, name, os.fstat(handle))
                self._write(handle, data, meta)
            finally:
                os.close(handle)
        finally:
            handles.restore()
            handles.forget()
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


def _is_lost(there: bytes, data: bytes) -> bool:
    """Whether ``there`` is ``data`` of which something was not written: it ends early, or pages of it are zero."""
    if len(there) > len(data):
        return False
    for at in range(0, len(there), _PAGE):
        page = there[at : at + _PAGE]
        if page != data[at : at + len(page)] and page.strip(b"\0"):
            return False
    return True
